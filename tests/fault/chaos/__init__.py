"""The chaos suite: real graphs in several processes, faults of a seeded schedule, and an oracle that compares.

`python -m tests.fault.chaos --minutes 5` starts a Valkey and a PostgreSQL, several workers that run graphs on many
threads through a proxy each, and injects one fault after another: into processes, servers and connections. Every worker
logs each call before it is made and after it has returned, outside the servers. At the end everything is healed and
drained, and what PostgreSQL holds and what every read gave is compared with what was acknowledged.

- `operations`: the log of operations, and the saver that writes it.
- `graphs`, `worker`: what a worker does.
- `schedule`, `faults`: which faults happen when, and how each is made.
- `oracle`: what is lost, stale, resurrected or incomplete, by the log and what was found; pure.
- `audit`: what PostgreSQL, and a new saver, hold; a process of its own.
- `run`: all of it together; `__main__` is the command.
"""
