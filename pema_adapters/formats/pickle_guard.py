"""What a pickle would build, told from its instructions alone: small ones can describe things of endless size.

A tuple of twice the same tuple of twice the same ... is a few bytes for each level, and twice the time to hash, compare
or print. What torch writes for tensors refers to names, sizes and tensors again, never to a list or dictionary, and
nests a few levels.
"""

import pickletools
from dataclasses import dataclass

MAX_DEPTH = 50
MAX_GROWTH = 10
_TENSOR_MAKERS = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter")
_MUTATORS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_CONTAINERS = {*_TUPLES, "LIST", "EMPTY_LIST", "DICT", "EMPTY_DICT", "EMPTY_SET", "FROZENSET", "REDUCE", "NEWOBJ"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}


@dataclass(frozen=True)
class _Value:
    """A value on the stack: levels of containers in it, letters or items of it, whether it may be referred to again."""

    depth: int = 0
    size: int = 1
    again: bool = True
    name: str = ""


_PLAIN, _MARK = _Value(), _Value(name="(")


def find_expansion_attack(table: bytes) -> str | None:
    """Why unpickling, hashing or printing what `table` describes may not end; None where it ends soon.

    Runs nothing and builds nothing. Raises ValueError for instructions that are none.
    """
    stack: list[_Value] = []
    memo: dict[object, _Value] = {}
    again = 0
    for opcode, argument, at in pickletools.genops(table):
        name = opcode.name
        if name in _PUT:
            memo[len(memo) if argument is None else argument] = stack[-1] if stack else _PLAIN
        elif name in _GET:
            stack.append(memo.get(argument, _PLAIN))
            again += stack[-1].size
            if not stack[-1].again or again > MAX_GROWTH * len(table):
                return f"refers to the same value again and again (byte {at})"
        elif name == "DUP":
            return f"repeats a value (byte {at})"
        elif name == "MARK":
            stack.append(_MARK)
        else:
            made = _apply(name, argument, _pop_arguments(stack, opcode))
            if made.depth > MAX_DEPTH:
                return f"nests deeper than {MAX_DEPTH} levels (byte {at})"
            stack.extend([made] * len(opcode.stack_after))
    return None


def _pop_arguments(stack: list[_Value], opcode: pickletools.OpcodeInfo) -> list[_Value]:
    """Take what the instruction takes, in order. Where the stack is too short the unpickler will complain."""
    found: list[_Value] = []
    for item in reversed(opcode.stack_before):
        while item is pickletools.stackslice and stack and stack[-1] is not _MARK:
            found.append(stack.pop())
        if item is not pickletools.stackslice and stack:
            found.append(stack.pop())
    return [value for value in reversed(found) if value is not _MARK]


def _apply(name: str, argument: object, popped: list[_Value]) -> _Value:
    """What the instruction leaves on the stack."""
    if name == "GLOBAL":
        return _Value(name=str(argument))
    if name in _MUTATORS and popped:
        inside = 1 + max((value.depth for value in popped[1:]), default=0)
        return _Value(max(popped[0].depth, inside), again=popped[0].again, name=popped[0].name)
    if name == "REDUCE" and popped and popped[0].name.startswith(_TENSOR_MAKERS):
        return _PLAIN
    if name in _CONTAINERS:
        depth = 1 + max((value.depth for value in popped), default=0)
        size = 1 + sum(value.size for value in popped)
        return _Value(depth, size, again=name in _TUPLES and depth == 1)
    return _Value(size=len(argument)) if isinstance(argument, str | bytes) else _PLAIN
