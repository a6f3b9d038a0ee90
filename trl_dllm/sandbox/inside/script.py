"""
What runs in the program's own, fresh interpreter, as `python -c`.

It reads a nonce and the source from descriptor 4, runs the source as `__main__`, and only where that ends by itself
writes the nonce to descriptor 3. Nothing printed, and no exit status, can be taken for that.
"""


def run_script() -> None:
    import contextlib
    import os
    import sys
    import types

    write, leave, getpid, me = os.write, os._exit, os.getpid, os.getpid()
    flush_out, flush_err = sys.stdout.flush, sys.stderr.flush
    with open(4, "rb") as file:
        nonce = file.read(32)
        source = file.read().decode("utf-8", "surrogatepass")
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.argv = ["main.py"]
    status = 1
    try:
        exec(compile(source, "main.py", "exec"), main.__dict__)
        flush_out()
        os.fstat(1)
        status = 0
    except SystemExit as error:
        status = 120
        with contextlib.suppress(BaseException):
            sys.stderr.write(f"SystemExit: {error.code}\n")
    except BaseException:
        with contextlib.suppress(BaseException):
            import traceback

            traceback.print_exc(limit=-20)
    for flush in (flush_out, flush_err):
        with contextlib.suppress(BaseException):
            flush()
    if status == 0 and getpid() == me:
        write(3, nonce)
    leave(status)


if __name__ == "__main__":
    run_script()
