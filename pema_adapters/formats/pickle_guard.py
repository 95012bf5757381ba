"""Detect pickles that expand without bound, from their opcodes alone, before anything is unpickled.

A tuple that holds another tuple twice, which holds another one twice, and so on, takes a few bytes a level, but each
level doubles the time to hash, compare or print it. Pickles of tensors reuse names, sizes and tensors, but never a
list or dictionary, and nest a few levels deep.
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
    """A value on the unpickler's stack.

    Attributes:
        depth: How many levels of containers it nests.
        size: How many characters or items it has.
        is_reusable: Whether tensors' pickles may refer to it again.
        name: The global that it is, "" for other values.
    """

    depth: int = 0
    size: int = 1
    is_reusable: bool = True
    name: str = ""


_PLAIN, _MARK = _Value(), _Value(name="(")


def find_expansion_attack(table: bytes) -> str | None:
    """Return why unpickling, hashing or printing a pickle may take forever, None if it will not.

    Executes nothing and builds nothing.

    Raises:
        ValueError: `table` is not a pickle.
    """
    stack: list[_Value] = []
    memo: dict[object, _Value] = {}
    reused = 0
    for opcode, argument, at in pickletools.genops(table):
        name = opcode.name
        if name in _PUT:
            memo[len(memo) if argument is None else argument] = stack[-1] if stack else _PLAIN
        elif name in _GET:
            stack.append(memo.get(argument, _PLAIN))
            reused += stack[-1].size
            if not stack[-1].is_reusable or reused > MAX_GROWTH * len(table):
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
    """Pop the arguments of an opcode, in order; a stack that is too short is left for the unpickler to report."""
    found: list[_Value] = []
    for item in reversed(opcode.stack_before):
        while item is pickletools.stackslice and stack and stack[-1] is not _MARK:
            found.append(stack.pop())
        if item is not pickletools.stackslice and stack:
            found.append(stack.pop())
    return [value for value in reversed(found) if value is not _MARK]


def _apply(name: str, argument: object, popped: list[_Value]) -> _Value:
    """Return what an opcode pushes."""
    if name == "GLOBAL":
        return _Value(name=str(argument))
    if name in _MUTATORS and popped:
        inside = 1 + max((value.depth for value in popped[1:]), default=0)
        return _Value(max(popped[0].depth, inside), is_reusable=popped[0].is_reusable, name=popped[0].name)
    if name == "REDUCE" and popped and popped[0].name.startswith(_TENSOR_MAKERS):
        return _PLAIN
    if name in _CONTAINERS:
        depth = 1 + max((value.depth for value in popped), default=0)
        size = 1 + sum(value.size for value in popped)
        return _Value(depth, size, is_reusable=name in _TUPLES and depth == 1)
    return _Value(size=len(argument)) if isinstance(argument, str | bytes) else _PLAIN
