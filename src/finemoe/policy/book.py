"""The cache's bookkeeping: what is resident, in flight and in use, and whose slot is taken. Kernels over flat arrays.

Expert `e` of layer `l` has the index `l * E + e`. Life of an expert: absent -> loading (it owns a slot) -> resident ->
absent (its slot was taken). What is pinned or loading is never a victim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.policy.kernel import compiled_as, kernel

Scores = npt.NDArray[np.float64]

ABSENT, LOADING, RESIDENT = 0, 1, 2
NOWHERE = 255  # Book.device of what there is not: experts that a layer has less than the largest
FREE, NONE = -1, -2  # instead of a victim's index: a free slot was there; there is nothing to be had
EVICTED, PREFETCHED, PREFETCHED_USED, WASTED, REGRETTED, PAUSED = range(6)  # of Book.tally
TRIED, GAINED, LOST, PAUSE = range(4)  # of Book.account
WINDOW = 256  # prefetches over which it is judged whether they pay: a few iterations' worth
PAUSE_ITERATIONS = 64  # then they are tried again: other requests may be more predictable


class Book(NamedTuple):
    """State of a cache of `C` slots, spread over devices. Arrays of length `L * E` unless said otherwise."""

    status: npt.NDArray[np.uint8]
    pinned: npt.NDArray[np.bool_]  # needed by the layer under way, and not used yet
    fresh: npt.NDArray[np.bool_]  # came, or is coming, by prefetch, and was not needed yet
    displaced: npt.NDArray[np.bool_]  # absent, because its slot went to a prefetch
    device: npt.NDArray[np.uint8]  # where it lives: round-robin, or `NOWHERE`
    room: npt.NDArray[np.int64]  # [devices], free slots
    tally: npt.NDArray[np.int64]  # [6], see above
    account: npt.NDArray[np.int64]  # [4]: what prefetches brought and cost, see `review`


def make_book(layers: int, experts: int, capacity: int, devices: int = 1) -> Book:
    """An empty cache. Device `i` has `capacity // devices` slots, the first ones one more if it does not divide."""
    size = layers * experts
    return Book(
        status=np.zeros(size, np.uint8),
        pinned=np.zeros(size, np.bool_),
        fresh=np.zeros(size, np.bool_),
        displaced=np.zeros(size, np.bool_),
        device=(np.arange(size) % devices).astype(np.uint8),
        room=np.array([(capacity + devices - 1 - i) // devices for i in range(devices)], np.int64),
        tally=np.zeros(6, np.int64),
        account=np.zeros(4, np.int64),
    )


def _least_worthy_loop(book: Book, worth: Scores, device: int) -> int:
    victim = NONE
    for expert in range(len(worth)):
        if book.status[expert] != RESIDENT or book.pinned[expert] or book.device[expert] != device:
            continue
        if victim == NONE or worth[expert] < worth[victim]:
            victim = expert
    return victim


@compiled_as(_least_worthy_loop)
def least_worthy(book: Book, worth: Scores, device: int) -> int:
    """The resident of lowest worth that nothing needs now (ties: the lowest index), or `NONE`."""
    may_go = (book.status == RESIDENT) & ~book.pinned & (book.device == device)
    victim = int(np.where(may_go, worth, np.inf).argmin())
    if may_go[victim]:
        return victim
    victim = int(may_go.argmax())  # every candidate is worth +inf, and argmin met another first; or there is none
    return victim if may_go[victim] else NONE


@kernel
def take_slot(book: Book, worth: Scores, device: int) -> int:
    """Takes a slot: `FREE`, or the index of the victim that lost its own, or `NONE`."""
    if book.room[device] > 0:
        book.room[device] -= 1
        return FREE
    victim = least_worthy(book, worth, device)
    if victim != NONE:
        book.status[victim] = ABSENT
        book.tally[EVICTED] += 1
        if book.fresh[victim]:
            book.fresh[victim] = False
            book.tally[WASTED] += 1
    return victim


@kernel
def need(book: Book, expert: int) -> int:
    """A layer needs this expert now: pins it. Returns its status."""
    book.pinned[expert] = True
    if book.fresh[expert]:
        book.fresh[expert] = False
        book.tally[PREFETCHED_USED] += 1
        book.account[GAINED] += 1
    elif book.displaced[expert]:
        book.displaced[expert] = False
        book.tally[REGRETTED] += 1
        book.account[LOST] += 1
    return int(book.status[expert])


@kernel
def need_all(book: Book, experts: npt.NDArray[np.int64], statuses: npt.NDArray[np.uint8]) -> int:
    """`need` of all that a layer needs, in order; `statuses` is filled in. Returns how many are absent."""
    absent = 0
    for i in range(len(experts)):
        statuses[i] = need(book, experts[i])
        absent += statuses[i] == ABSENT
    return absent


@kernel
def begin_prefetch(book: Book, worth: Scores, expert: int) -> int:
    """Takes a slot for a prefetch that `choose_prefetch` named. Returns the victim, or `FREE`."""
    victim = take_slot(book, worth, book.device[expert])
    book.status[expert] = LOADING
    book.fresh[expert] = True
    book.displaced[expert] = False
    if victim >= 0:
        book.displaced[victim] = True
    book.tally[PREFETCHED] += 1
    book.account[TRIED] += 1
    return victim


@kernel
def review(book: Book) -> None:
    """An iteration begins: after every `WINDOW` prefetches, pauses them if they did not pay.

    They pay if more of them were needed than of the experts that had made room for them. Moving them costs nothing
    here, as they only use a link that is idle.
    """
    if book.account[PAUSE] > 0:
        book.account[PAUSE] -= 1
    elif book.account[TRIED] >= WINDOW:
        if book.account[GAINED] <= book.account[LOST]:
            book.account[PAUSE] = PAUSE_ITERATIONS
        book.account[:PAUSE] = 0
    book.tally[PAUSED] += book.account[PAUSE] > 0


@kernel
def give_up(book: Book, expert: int) -> None:
    """What was loading will not come: its slot is free."""
    book.status[expert] = ABSENT
    book.room[book.device[expert]] += 1
    if book.fresh[expert]:
        book.fresh[expert] = False
        book.tally[WASTED] += 1


def _most_wanted_loop(book: Book, want: Scores, device: int) -> int:
    best = NONE
    for expert in range(len(want)):
        if not want[expert] > 0 or book.status[expert] != ABSENT or book.device[expert] != device:
            continue
        if best == NONE or want[expert] > want[best]:
            best = expert
    return best


@compiled_as(_most_wanted_loop)
def most_wanted(book: Book, want: Scores, device: int) -> int:
    """The absent expert that is wanted most (ties: the lowest index), or `NONE` if none is wanted."""
    candidates = (book.status == ABSENT) & (want > 0) & (book.device == device)
    best = int(np.where(candidates, want, -np.inf).argmax())
    return best if candidates[best] else NONE


@kernel
def choose_prefetch(book: Book, worth: Scores, want: Scores, margin: float, device: int) -> int:
    """The absent expert that is wanted most (`want` above 0; it may be empty), or `NONE`, as while paused.

    It must be worth its victim: wanted by more than `margin` above the victim's worth. With a margin of `-inf` the two
    scores are not comparable; then it must only be wanted more than its victim is.
    """
    best = most_wanted(book, want, device) if len(want) and book.account[PAUSE] == 0 else NONE
    if best == NONE:
        return NONE
    if book.room[device] > 0:
        return best
    victim = least_worthy(book, worth, device)
    if victim == NONE:
        return NONE
    if margin == -np.inf:
        return best if want[best] > want[victim] else NONE
    return best if want[best] > worth[victim] + margin else NONE


@kernel
def next_prefetch(
    book: Book, worth: Scores, want: Scores, margin: float, device: int, chosen: npt.NDArray[np.int64]
) -> None:
    """`choose_prefetch`, and `begin_prefetch` if there is one. `chosen` `[2]` becomes the expert and its victim."""
    chosen[0] = choose_prefetch(book, worth, want, margin, device)
    if chosen[0] != NONE:
        chosen[1] = begin_prefetch(book, worth, chosen[0])


@kernel
def still_wanted(
    book: Book, worth: Scores, want: Scores, margin: float, switch: float, device: int, expert: int
) -> bool:
    """Whether a prefetch under way is worth going on with: wanted, worth its slot, and no other is wanted far more."""
    if not want[expert] > 0:
        return False
    if margin != -np.inf:
        rival = least_worthy(book, worth, device)
        if rival != NONE and want[expert] < worth[rival]:
            return False
    if switch == np.inf:
        return True
    other = choose_prefetch(book, worth, want, margin, device)
    return other == NONE or not want[other] > switch * want[expert]
