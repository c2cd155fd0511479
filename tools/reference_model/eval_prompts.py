"""Fifty prompts in ten domains, written before any answer was seen; none is used in distillation."""

PROMPTS: dict[str, tuple[str, ...]] = {
    "e-mail": (
        "Write a thank-you e-mail to a colleague who helped me finish a report on time.",
        "Write a short e-mail asking my landlord to repair the heating.",
        "Draft a polite message to decline a wedding invitation.",
        "Write an e-mail to my team announcing that Friday's meeting moves to Monday.",
        "Write a short apology to a customer whose parcel arrived late.",
    ),
    "facts": (
        "What is the capital of Australia?",
        "Why is the sky blue?",
        "Who painted the Mona Lisa?",
        "How do vaccines protect us from disease?",
        "What is the difference between weather and climate?",
    ),
    "science": (
        "How does a refrigerator keep food cold?",
        "What happens to water molecules when ice melts?",
        "Explain Newton's third law with an everyday example.",
        "Why do leaves change colour in autumn?",
        "What is DNA and what does it do?",
    ),
    "history": (
        "What caused the First World War?",
        "Tell me about the ancient Egyptians and their pyramids.",
        "Who was Marie Curie and why is she remembered?",
        "What was the Silk Road?",
        "Describe daily life in a medieval village.",
    ),
    "stories": (
        "Tell me a bedtime story about a fox who could not sleep.",
        "Write the opening paragraph of a mystery novel set in Venice.",
        "Write a haiku about the sea in winter.",
        "Invent a superhero whose only power is perfect patience.",
        "Write a dialogue between a cat and the moon.",
    ),
    "advice": (
        "How can I fall asleep faster at night?",
        "I am nervous about my first day at a new school. What should I do?",
        "How do I make new friends in a big city?",
        "What should I pack for a weekend hiking trip?",
        "How can I stop wasting so much time on my phone?",
    ),
    "code": (
        "Write a Python function that reverses a string.",
        "What does a for loop do in programming?",
        "Write a Python function that returns the largest number in a list.",
        "Explain what an API is to someone who has never programmed.",
        "How do I read a text file line by line in Python?",
    ),
    "numbers": (
        "A train travels 60 miles in 1.5 hours. What is its average speed?",
        "If I buy 3 apples for 2 dollars each and pay with a 10 dollar bill, how much change do I get?",
        "What is 15 percent of 200?",
        "How many minutes are there in a week?",
        "What is the area of a rectangle that is 7 metres long and 4 metres wide?",
    ),
    "language": (
        "Rewrite this sentence more politely: Give me the book now.",
        "List five synonyms for the word happy.",
        "Correct the grammar: She don't likes going to the market.",
        (
            "Summarize in one sentence: The meeting lasted two hours, and we agreed to hire two engineers "
            "and delay the launch."
        ),
        "What does the idiom 'a piece of cake' mean?",
    ),
    "everyday": (
        "Give me a simple recipe for pancakes.",
        "What are good exercises for someone who sits all day?",
        "Suggest three names for a small bakery.",
        "How do I take care of a cactus?",
        "Plan a one-day visit to London for a family with children.",
    ),
}
