"""
Inside a sandbox: builds one around itself, runs one process in it that is not trusted, reports what happened.

The library imports nothing of this but the form of requests and reports (`request`, `wire`): `sandbox.launch` starts
it as a program, writes requests to its standard input and reads reports from its standard output. Standard library
only; Linux only. From the outside in:

- `launcher` forks a process for each request. A script is one request; a candidate and its judge are two, in two
  sandboxes, with a channel between them.
- `namespaces`, `bubblewrap` and `other_user` are the kinds. The first two make new user, mount, network, IPC and PID
  namespaces and a small file system in memory (`files`), and are PID 1 in there, so that their end is the end of every
  process. The third is for root where no namespaces can be made: a user id of its own, Landlock for the files
  (`landlock`), and at the end all processes of that user are killed and its files removed (`folders`).
- `monitor` starts the process and watches it: its time, its output, and by `meter` and `usage` its memory and files.
- `program` sets `limits` and the system-call `filter` and becomes a fresh interpreter, which `boot` gives its modules.
- In that interpreter runs `script`, or `candidate` (the program, and `main` to run its source), or `judge` (the test).
"""
