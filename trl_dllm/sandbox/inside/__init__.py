"""
Inside a sandbox: builds one around itself, runs one untrusted program in it, reports what happened.

The library imports nothing of this but the form of a request: `sandbox.run` starts it as a program, writes a `Request`
to its standard input and reads a `Report` from its standard output, both as JSON. Standard library only; Linux only.

Three kinds, all with the same monitor (`monitor`) around the program:

- namespaces: launcher → setup (new user, mount, network, IPC, PID … namespaces) → monitor (PID 1 in there, so that its
  end is the end of every process) → program. The file system is a new, small tmpfs with Python's own folders bound
  read-only.
- bubblewrap: the same, set up by `bwrap`.
- uid: for root where no namespaces can be made: the program runs under a user id of its own, and what is left of that
  user is killed. The network is closed by the system-call filter alone.
"""
