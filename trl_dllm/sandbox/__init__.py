"""Running programs that a model wrote, which are not trusted, and reporting whether they do what they should.

    result = run_trial(Trial("def double(x): return 2 * x", "assert double(3) == 6", script=""))
    result.passed, result.reason, result.judged

There are three kinds of sandbox, and the first that works is taken: bubblewrap; namespaces, made here, which needs no
helper; and for root, where no namespaces can be made, a user id of its own ("uid").

Who is trusted: the caller, and the tests, which come with the data. Who is not: the program. It may do anything that a
process can. What is guaranteed against it, and by what:

- **It ends, and all that it started ends with it.** Wall-clock and CPU time, and the number of processes, are limited;
  it runs in a PID namespace, or under a user id of its own whose processes are all killed.
- **Memory.** Each process has `memory_bytes` of address space. A monitor adds up what they all have, often enough that
  the sum exceeds the limit by no more than 64 MiB a CPU core before they are killed (8 MiB were measured on two). What
  belongs to no process, and so would not be counted, cannot be had: the system-call filter refuses shared mappings of
  any kind, anonymous files, System V segments, huge pages, larger pipes and sockets, and what the kernel would have to
  remember for the program, such as locks and events of files. (So there is no `multiprocessing.Lock`, `Queue` or
  `Pool`, no SQLite database in a file, and `mmap` needs MAP_PRIVATE.) Where processes cannot be counted, a program
  gets only one.
- **Files.** In namespaces the program has a file system of its own, in memory and of `disk_bytes`: that counts deleted
  files that are still open, too. Under a user id of its own the monitor adds up what lies in the working directory and
  what was deleted and is open or mapped. Nothing stays behind.
- **Nothing is seen or reached:** no network, no environment, no open file of the caller, no other process, no file
  but those of Python and of the system (/usr), which are read-only. Under a user id of its own that takes Landlock.
- **Nothing is raised.** What a program does becomes an `ExecutionResult`; `SandboxUnavailable` is raised only where an
  empty program does not run either.
- **A wrong program does not pass a test that is judged outside** (`judged == "outside"`). The test then runs in a
  sandbox of its own, and its calls of the program go through a channel that carries data of a few types only (see
  `inside.wire`); the expected values never leave the test's process, and no code of the program enters it. Every test
  of HumanEval and MBPP is of that form. What decides is the test's source alone (`form`).

What is not guaranteed:

- A test of another form is judged "inside", as one script with the program, which can then pass whatever it does: an
  object that claims to equal everything is enough. Results say which it was, and an evaluation counts them.
- A program sees the arguments it is called with, may know answers by heart, and may behave differently when tested.
- A bug in the kernel. On a busy machine the monitor may look later than it meant to. Programs share the CPU with the
  caller, and N trials at a time may take 2 N times `memory_bytes`, half of it for the tests.
- The kind "uid" on a kernel without Landlock: the program reads what any user may read, data sets with the answers
  among it, and writes where any user may write; only what it leaves in /tmp, /var/tmp and /dev/shm is counted and
  removed.
- Linux only, on x86_64 and aarch64: elsewhere there is no sandbox, and without one nothing runs.

Nothing here runs unasked: rewards that need it want `allow_code_execution=True` or TRL_DLLM_ALLOW_CODE_EXECUTION=1.
"""

from .kinds import SANDBOXES, choose_sandbox
from .launch import SandboxUnavailable
from .providers import (
    ALLOW_VARIABLE,
    CodeExecutionProvider,
    LocalProvider,
    Suite,
    TrialProvider,
    check_allowed,
    get_provider,
    register_provider,
    run_suites,
)
from .run import ExecutionResult, Trial, run_many, run_program, run_trial, run_trials


__all__ = [
    "ALLOW_VARIABLE",
    "SANDBOXES",
    "CodeExecutionProvider",
    "ExecutionResult",
    "LocalProvider",
    "SandboxUnavailable",
    "Suite",
    "Trial",
    "TrialProvider",
    "check_allowed",
    "choose_sandbox",
    "get_provider",
    "register_provider",
    "run_many",
    "run_program",
    "run_suites",
    "run_trial",
    "run_trials",
]
