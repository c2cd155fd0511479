"""`finemoe bench serve`: benchmarks of the server, which run `finemoe serve` and send requests over HTTP.

- `load`: a published trace's arrivals, under several policies
- `concurrency`: throughput by the number of clients
- `soak`: memory over time under mixed requests, and what is left afterwards
- `overhead`: time per token through HTTP, by the worker alone, and by `generate`

They share `config` (settings), `server` (the process under test), `client` (sends and times requests) and `scenario`
(documents and tables).
"""
