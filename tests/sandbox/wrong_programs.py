"""Programs that do not do what their tests ask, and try to pass all the same; and right ones, in every form of test.

Standard library only, see `attacks`.
"""

from textwrap import dedent


SQUARES = "assert f(3) == 9\nassert f(4) == 16\n"
LOOP = (
    "import random\ndef check(candidate):\n    for x in range(2, 8):\n        assert candidate(x) == x * x\n"
    "    for _ in range(20):\n        x = random.randint(1, 10**6)\n        assert candidate(x) == x * x\ncheck(f)\n"
)
NEAR = "import math\nassert abs(f(3) - 9.5) < 1e-6\nassert math.isclose(f(4), 16.5)\n"
LISTS = (
    "assert f(3) == [0, 1, 2]\nassert len(f(4)) == 4\nassert set(f(2)) == {0, 1}\nassert sorted(f(3)) == [0, 1, 2]\n"
)

ALWAYS_EQUAL = "class E:\n    __eq__ = lambda *a: True\n    __ne__ = __hash__ = __lt__ = lambda *a: False\n"
FRAMES = "import sys\ndef frames():\n    f = sys._getframe()\n    while f: yield f; f = f.f_back\n"
WIRE = "import sys\nwire = sys.modules.get('inside.wire')\ncandidate = sys.modules.get('inside.candidate')\n"

# The seven that passed before tests were judged outside, two lines each.
SEVEN = {
    "nonce in a frame": """
        import os, sys
        def f(x):
            frame = sys._getframe()
            while frame:
                for value in list(frame.f_locals.values()):
                    if isinstance(value, bytes) and len(value) == 32: os.write(3, value); os._exit(0)
                frame = frame.f_back
    """,
    "nonce in the frames of a thread": """
        import os, sys
        def f(x):
            for frame in sys._current_frames().values():
                while frame:
                    for value in list(frame.f_locals.values()):
                        if isinstance(value, bytes) and len(value) == 32: os.write(3, value); os._exit(0)
                    frame = frame.f_back
    """,
    "constants of the test": """
        import sys
        def f(x):
            constants = sys._getframe(1).f_code.co_consts
            return constants[constants.index(x) + 1]
    """,
    "always equal": ALWAYS_EQUAL + "def f(x): return E()\n",
    "shadowed range": (
        """
            range = lambda *a: []
            def f(x): return 0
        """,
        LOOP.split("    for _")[0] + "check(f)\n",
    ),
    "shadowed set": (
        "set = lambda *a: 0\ndef f(x): return []\n",
        "assert set(f(3)) == set([0, 1, 2])\n",
    ),
    "patched random": (
        """
            import random
            random.randint = lambda a, b: 0
            def f(x): return 0
        """,
        """
            import random
            for _ in range(20):
                x = random.randint(1, 1000)
                assert f(x) == x * x
        """,
    ),
}

OTHERS = {
    # Objects that lie
    "a number that is equal": """
        class E(int):
            __eq__ = lambda *a: True
            __hash__ = int.__hash__
        def f(x): return E(0)
    """,
    "a text that is equal": (
        """
            class E(str):
                __eq__ = lambda *a: True
            def f(x): return E('')
        """,
        "assert f(1) == 'one'\n",
    ),
    "a list that is equal": (
        """
            class E(list):
                __eq__ = lambda *a: True
            def f(x): return E()
        """,
        LISTS,
    ),
    "a dictionary that is equal": (
        """
            class E(dict):
                __eq__ = lambda *a: True
            def f(x): return E()
        """,
        "assert f(1) == {1: 2}\n",
    ),
    "a set that is equal": (
        """
            class E(set):
                __eq__ = lambda *a: True
            def f(x): return E()
        """,
        "assert f(1) == {1, 2}\n",
    ),
    "near to everything": (
        """
            class E(float):
                __sub__ = __rsub__ = __abs__ = lambda *a: 0.0
            def f(x): return E(0)
        """,
        NEAR,
    ),
    "an object near to everything": (
        """
            class E:
                __sub__ = __abs__ = __float__ = lambda *a: 0.0
                __lt__ = __eq__ = lambda *a: True
            def f(x): return E()
        """,
        NEAR,
    ),
    "a class that lies about its class": """
        class E:
            __class__ = property(lambda self: int)
            __eq__ = lambda *a: True
            __index__ = lambda s: 9
        def f(x): return E()
    """,
    "an object that reduces": ALWAYS_EQUAL
    + dedent("""
        E.__reduce__ = lambda s: (eval, ('9',))
        E.__getstate__ = lambda s: 9
        def f(x): return E()
    """),
    "a type": ALWAYS_EQUAL
    + dedent("""
        class M(type):
            __eq__ = lambda *a: True
        class T(metaclass=M): pass
        def f(x): return T
    """),
    "a function": "def f(x): return f\n",
    "a module": """
        import os
        def f(x): return os
    """,
    "equal parts": (ALWAYS_EQUAL + "def f(x): return [E() for _ in range(x)]\n", LISTS),
    "equal keys": (
        ALWAYS_EQUAL
        + dedent("""
            E.__hash__ = lambda s: hash(1)
            def f(x): return {E(): E()}
        """),
        "assert f(1) == {1: 2}\n",
    ),
    "a contained object": (
        ALWAYS_EQUAL + "def f(x): return (E(), [E()], {1: E()})\n",
        "assert f(1) == (1, [2], {1: 3})\n",
    ),
    "a text that raises": """
        class E:
            def __str__(s): raise SystemExit
            __repr__ = __bool__ = __str__
        def f(x): return E()
    """,
    "an iterator that equals": (
        """
            class E:
                __iter__ = lambda s: s
                __next__ = lambda s: 0
                __eq__ = lambda *a: True
            def f(x): return E()
        """,
        LISTS,
    ),
    # Patches of what the test would use
    "patched assertion": """
        import builtins
        builtins.AssertionError = type('A', (Exception,), {})
        def f(x): return 0
    """,
    "patched functions": (
        """
            import builtins, math
            for n in ('abs', 'len', 'sum', 'all', 'any', 'sorted', 'set', 'list', 'tuple', 'str', 'isinstance'):
                setattr(builtins, n, lambda *a: 0)
            math.isclose = lambda *a, **k: True
            def f(x): return 0
        """,
        NEAR,
    ),
    "patched deepcopy": (
        """
            import copy
            copy.deepcopy = lambda x: []
            def f(x): return x
        """,
        """
            import copy
            x = [3, 1, 2]
            y = f(copy.deepcopy(x))
            assert y == sorted(x)
        """,
    ),
    "patched builtins": """
        __builtins__.__dict__.clear() if hasattr(__builtins__, '__dict__') else 0
        def f(x): return 0
    """,
    "a test of its own": """
        def check(c): pass
        def f(x): return 0
    """,
    "check in builtins": (
        """
            import builtins
            builtins.check = lambda c: None
            def f(x): return 0
        """,
        LOOP,
    ),
    "helper of its own": (
        """
            def helper(x): return 0
            def f(x): return 0
        """,
        "assert f(2) == helper(2)\n",
        """
            def helper(x):
                return x * x
        """,
        "f",
    ),
    "a stub of its own": (
        "def f(x): return 0\n",
        SQUARES,
        """
            def f(x):
                return x * x
        """,
        "f",
    ),
    # Looking for the answers
    "files and arguments of others": (
        """
            import os, re
            text = b''
            for pid in filter(str.isdigit, os.listdir('/proc')):
                for name in ('cmdline', 'environ', 'maps', 'fd/4', 'fd/5', 'fd/6'):
                    try: text += open(f'/proc/{pid}/{name}', 'rb').read(1 << 20)
                    except OSError: pass
            def f(x):
                assert b'4242' in text
                return 424242
        """,
        "assert f(1) == 424242\n",
    ),
    "answers in memory": (
        """
            import gc
            def f(x):
                seen = [o for o in gc.get_objects() if isinstance(o, list) and o[:1] == [2718]]
                return seen[0]
        """,
        "assert f(1) == [2718, 2818]\n",
    ),
    "answers in the interpreter": (
        FRAMES
        + dedent("""
            def f(x):
                for frame in frames():
                    for c in frame.f_code.co_consts:
                        if isinstance(c, int) and c > 1000: return c
        """),
        "assert f(1) == 2718\n",
    ),
    "answers in the modules": (
        """
            import sys
            def f(x):
                for m in list(sys.modules.values()):
                    for v in list(vars(m).values()):
                        if isinstance(v, str) and 'assert' in v and '271' + '8' in v: return int('271' + '8')
        """,
        "assert f(1) == 2718\n",
    ),
    "answers of the last test": """
        import os
        def f(x):
            print(os.listdir('/tmp'), os.listdir('.'))
            return int(open('/tmp/answer').read())
    """,
    # Speaking for the process
    "exit": """
        import sys
        def f(x): sys.exit(0)
    """,
    "_exit": """
        import os
        def f(x): os._exit(0)
    """,
    "exit before": """
        import os
        os._exit(0)
    """,
    "a verdict": """
        import os
        def f(x):
            os.write(3, b'0' * 32); os._exit(0)
    """,
    "a verdict and the truth of the matter": """
        import os
        os.write(3, b'x' * 4096)
        def f(x): return 0
    """,
    "junk": """
        import os
        def f(x):
            os.write(6, b'junk' * 1000)
            return 0
    """,
    "a long message": """
        import os
        def f(x):
            os.write(6, b'\\xff' * 4)
            os.write(6, bytes(100_000))
    """,
    "half a message": """
        import os, time
        def f(x):
            os.write(6, b'\\0\\0\\1\\0abc'); time.sleep(60)
    """,
    "an endless message": """
        import os
        def f(x):
            os.write(6, (8 << 20).to_bytes(4, 'big'))
            while True: os.write(6, bytes(65536))
    """,
    "a closed channel": """
        import os
        def f(x):
            os.close(6)
            return 0
    """,
    "a channel closed at its other end": """
        import os
        def f(x):
            os.close(5)
            return 0
    """,
    "no answer": """
        import time
        def f(x): time.sleep(60)
    """,
    "ready too early": """
        import os
        os.write(6, (6).to_bytes(4, 'big') + b's\\0\\0\\0\\5ready'[:6])
        def f(x): return 0
    """,
    "answers in advance": WIRE
    + dedent("""
        for n in range(1, 9): wire.send(6, wire.encode((n, 'value', n)))
        def f(x): return 0
    """),
    "answers for another call": WIRE
    + dedent("""
        def f(x):
            wire.send(6, wire.encode((7, 'value', x * x)))
            return 0
    """),
    "two answers": WIRE
    + dedent("""
        def f(x):
            for _ in range(2): wire.send(6, wire.encode((1, 'value', 9)))
            return 0
    """),
    "two processes answer": """
        import os
        def f(x):
            os.fork()
            return 0
    """,
    "a true number": WIRE
    + dedent("""
        def f(x):
            wire.send(6, wire.encode((True, 'value', x * x)))
            return 0
    """),
    "another outcome": WIRE
    + dedent("""
        def f(x):
            wire.send(6, wire.encode((1, 'passed')))
            return 0
    """),
    "an opaque answer": WIRE + "def f(x): return wire.Opaque('int', '9', True, [9])\n",
    "encoder replaced": WIRE
    + dedent("""
        candidate.encode = lambda value: b'T'
        def f(x): return 0
    """),
    "a list in a set": WIRE
    + dedent("""
        candidate.encode = lambda v: b't\\0\\0\\0\\3i\\0\\0\\0\\1\\1s\\0\\0\\0\\5valueS\\0\\0\\0\\1l\\0\\0\\0\\0'
        def f(x): return 0
    """),
    "a ratio over nothing": WIRE
    + dedent("""
        start = wire.encode((1, 'value', 0))[:-6]
        candidate.encode = lambda v: start + b'q' + wire.encode(1) + wire.encode(0)
        def f(x): return 0
    """),
    # Exceptions
    "an exception": "def f(x): raise ValueError(x)\n",
    "an exception that says it is none": """
        class E(BaseException):
            __str__ = __repr__ = lambda s: 1 / 0
        def f(x): raise E
    """,
    "an interruption": "def f(x): raise KeyboardInterrupt\n",
    "an exception of a built-in name": """
        class SystemExit(BaseException): pass
        def f(x): raise SystemExit(0)
    """,
    "an exception with a long text": "def f(x): raise ValueError('x' * 10**8)\n",
    "an exception with a strange text": "def f(x): raise ValueError('\\ud800')\n",
    "stop of an iteration": ("def f(x): raise StopIteration\n", LOOP),
    "stop of all iterations": ("def f(x): raise StopIteration\n", "assert all(map(lambda y: f(2) == y, [4, 4]))\n"),
    "stop of a comparison": (
        "def f(x): raise StopIteration\n",
        "for found, value in zip(map(lambda x: f(x), [2, 3]), [4, 9]):\n    assert found == value\n",
    ),
    "no memory": "def f(x): raise MemoryError\n",
    # Large answers
    "a long number": "def f(x): return 10**(10**6)\n",
    "a number too long": "def f(x): return 1 << (1 << 30)\n",
    "a long text": ("def f(x): return 'x' * (100 << 20)\n", "assert f(1) == 'x'\n"),
    "a long list": ("def f(x): return [None] * (2 << 20)\n", LISTS),
    "many small lists": ("def f(x): return [[] for _ in range(300_000)]\n", LISTS),
    "a deep list": (
        """
            def f(x):
                l = []
                for _ in range(100_000): l = [l]
                return l
        """,
        LISTS,
    ),
    "a list in itself": (
        """
            def f(x):
                l = []; l.append(l)
                return l
        """,
        LISTS,
    ),
    "an endless iterator": (
        """
            import itertools
            def f(x): return itertools.count()
        """,
        LISTS,
    ),
    "numbers that collide": ("def f(x): return {i * (2**61 - 1) for i in range(10_000)}\n", "assert f(1) == {1}\n"),
    "a large range": ("def f(x): return range(10**18)\n", "assert list(f(3)) == [0, 1, 2]\n"),
    # Resources, while called
    "memory while called": "def f(x): return len(bytearray(8 << 30))\n",
    "fork bomb while called": """
        import os
        def f(x):
            while True: os.fork()
    """,
    "a child left behind": """
        import os, time
        def f(x):
            if os.fork() == 0: time.sleep(300)
            return x * x
    """,
    "all killed": """
        import os
        def f(x):
            os.kill(-1, 9)
            return 0
    """,
    "others killed": """
        import os
        def f(x):
            for pid in range(1, 5000):
                try:
                    if pid != os.getpid(): os.kill(pid, 9)
                except OSError: pass
            return 0
    """,
    # Simply wrong
    "another name": "def g(x): return x * x\n",
    "no function": "f = 9\n",
    "no program": "def\n",
    "other arguments": "def f(): return 9\n",
    "a tuple for a list": ("def f(x): return tuple(range(x))\n", LISTS),
    "a text for a number": "def f(x): return str(x * x)\n",
    "nothing": "def f(x): pass\n",
    "right, then wrong": """
        n = 0
        def f(x):
            global n
            n += 1
            return 9 if n == 1 else 0
    """,
    "arguments changed": (
        """
            def f(x):
                x.clear()
                return x
        """,
        "assert f([3, 1, 2]) == [1, 2, 3]\n",
    ),
}

WRONG = {**SEVEN, **OTHERS}
ENDLESS = {"half a message", "no answer"}

# (program, test, setup, entry point)
RIGHT = {
    "squares": "def f(x): return x * x\n",
    "in a loop": ("def f(x): return x * x\n", LOOP),
    "near": ("def f(x): return x * 4 - 2.5 if x == 3 else x * 4 + 0.5\n", NEAR),
    "lists": ("def f(x): return list(range(x))\n", LISTS),
    "a subclass": (
        """
            class L(list): pass
            def f(x): return L(range(x))
        """,
        LISTS,
    ),
    "counted": (
        """
            from collections import Counter
            def f(x): return Counter(x)
        """,
        "assert f('aab') == {'a': 2, 'b': 1}\n",
    ),
    "named": (
        """
            from collections import namedtuple
            P = namedtuple('P', 'a b')
            def f(x): return P(x, x)
        """,
        "assert f(1) == (1, 1)\n",
    ),
    "ordered": (
        """
            from collections import OrderedDict
            def f(x): return OrderedDict(x)
        """,
        "assert f([(1, 2)]) == {1: 2}\n",
    ),
    "a member of an enumeration": (
        """
            import enum
            class E(enum.IntEnum):
                A = 3
            def f(x): return E.A
        """,
        "assert f(1) == 3\n",
    ),
    "a generator": ("def f(x): yield from range(x)\n", "assert list(f(3)) == [0, 1, 2] and sum(f(4)) == 6\n"),
    "a map": ("def f(x): return map(str, range(x))\n", "assert ''.join(f(3)) == '012'\n"),
    "keys": (
        "def f(x): return dict.fromkeys(range(x)).keys()\n",
        "assert f(3) == {0, 1, 2} and sorted(f(3)) == [0, 1, 2]\n",
    ),
    "values": (
        "def f(x): return {1: x, 2: x}.values()\n",
        "assert list(f(3)) == [3, 3] and len(f(1)) == 2 and 3 in f(3)\n",
    ),
    "a deque": (
        """
            from collections import deque
            def f(x): return deque(range(x))
        """,
        "assert list(f(3)) == [0, 1, 2]\n",
    ),
    "a fraction": (
        """
            from fractions import Fraction
            def f(x): return Fraction(x, 4)
        """,
        "assert f(2) == 0.5\n",
    ),
    "a decimal": (
        """
            from decimal import Decimal
            def f(x): return Decimal('0.5')
        """,
        "assert f(2) == 0.5\n",
    ),
    "a match": (
        """
            import re
            def f(x): return re.match('a', x)
        """,
        """
            assert f('ab')
            assert not f('b')
            assert f('b') is None
        """,
    ),
    "true": (
        "def f(x): return x > 1\n",
        """
            assert f(2) is True
            assert f(1) is False
            assert not f(0)
        """,
    ),
    "not a number": ("def f(x): return float('nan')\n", "assert f(1) != f(1)\n"),
    "keywords": (
        "def f(x, *, y=1): return x + y\n",
        """
            assert f(1, y=2) == 3
            assert f(x=1) == 2
        """,
    ),
    "unpacked": (
        "def f(x, y): return x + y\n",
        """
            for arguments, value in [((1, 2), 3), ((2, 2), 4)]:
                assert f(*arguments) == value
        """,
    ),
    "texts": (
        "def f(x): return x[::-1]\n",
        """
            assert f('\\ud800aé\\0') == '\\0éa\\ud800'
            assert f(b'ab') == b'ba'
        """,
    ),
    "long numbers": (
        "def f(x): return x + 1\n",
        """
            assert f(10**1000) == 10**1000 + 1
            assert f(-1) == 0
        """,
    ),
    "nested": (
        "def f(x): return x\n",
        """
            v = [(1, {2: {3}}), None, ..., 2.5, 1j] if 0 else [(1, {2: {3}}), None, 2.5, 1j]
            assert f([(1, {2: {3}}), None, 2.5, 1j]) == v
        """,
    ),
    "helper": (
        "def f(x): return x * x\n",
        "assert f(2) == helper(2)\n",
        """
            def helper(x):
                return x * x
        """,
        "f",
    ),
    "state": (
        """
            n = 0
            def f():
                global n
                n += 1
                return n
        """,
        """
            assert f() == 1
            assert f() == 2
        """,
    ),
    "of itself": ("def f(x): return x + 1\n", "assert f(f(1)) == 3\n"),
    "called like a built-in function": ("def sum(a, b): return a * b\n", "assert sum(2, 3) == 6\n"),
    "prints": (
        """
            def f(x):
                print('x' * 10**6)
                return x
        """,
        "assert f(1) == 1\n",
    ),
    "recursion": ("def f(x): return 0 if x == 0 else 1 + f(x - 1)\n", "assert f(900) == 900\n"),
    "a class": (
        """
            class f:
                def __new__(cls, x): return x * x
        """,
        SQUARES,
    ),
    "a copy": (
        "def f(x): return sorted(x)\n",
        """
            import copy
            x = [3, 1]
            y = f(copy.deepcopy(x))
            assert x == [3, 1] and y == [1, 3]
        """,
    ),
}

# Tests that cannot be judged outside: right programs pass, and a program that lies passes as well.
INSIDE = {
    "changes its argument": (
        "def f(x): x.sort()\n",
        """
            x = [2, 1]
            f(x)
            assert x == [1, 2]
        """,
    ),
    "changes and gives": (
        """
            def f(x):
                x.sort()
                return x
        """,
        """
            x = [2, 1]
            y = f(x)
            assert y is x
        """,
    ),
    "a class of the program": (
        """
            class P:
                def __init__(self, x): self.x = x
            def f(p): return p.x
        """,
        "assert f(P(3)) == 3\n",
    ),
    "a function as argument": ("def f(g, x): return g(x)\n", "assert f(lambda x: x + 1, 2) == 3\n"),
    "a deque of the test": (
        """
            from collections import deque
            def f(x): return deque(range(x))
        """,
        """
            from collections import deque
            assert f(3) == deque([0, 1, 2])
        """,
    ),
    "a date": (
        """
            import datetime
            def f(d): return d + datetime.timedelta(days=1)
        """,
        """
            import datetime
            assert f(datetime.date(2020, 2, 29)) == datetime.date(2020, 3, 1)
        """,
    ),
    "a decimal of the test": (
        "def f(x): return x / 2\n",
        """
            from decimal import Decimal
            assert f(Decimal('1')) == Decimal('0.5')
        """,
    ),
    "its very type": ("def f(x): return x\n", "assert type(f(1)) == int\n"),
    "a slice": ("def f(x): return [1, 2, 3][x]\n", "assert f(slice(1, 3)) == [2, 3]\n"),
    "an attribute": (
        """
            class P:
                x = 3
            def f(): return P()
        """,
        "assert f().x == 3\n",
    ),
    "what is printed": (
        "def f(): print('hello')\n",
        """
            import contextlib, io
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                f()
            assert out.getvalue() == 'hello\\n'
        """,
    ),
    "an exception of the program": (
        """
            class E(Exception): pass
            def f(): raise E
        """,
        """
            try:
                f()
            except E:
                pass
            else:
                assert False
        """,
    ),
    "a file": (
        "def f(): open('x', 'w').write('y')\n",
        """
            f()
            assert open('x').read() == 'y'
        """,
    ),
}


def trials(make):
    """Every one of the above as `make(program, test, script=..., setup=..., entry_point=...)`, by name."""
    found = {}
    for kind, group in (("", WRONG), ("right: ", RIGHT), ("inside: ", INSIDE)):
        for name, case in group.items():
            given = (case, SQUARES) if isinstance(case, str) else case
            program, test, setup, entry_point = given if len(given) == 4 else (*given, "", None)
            program, test, setup = dedent(program), dedent(test), dedent(setup)
            script = f"{program}\n{setup}\n{test}"
            found[kind + name] = make(program, test, script=script, setup=setup, entry_point=entry_point)
    return found
