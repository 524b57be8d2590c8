"""Triton's interpreter without the half of its time in which it looks through its own language and types again."""

from typing import Any

from triton.language import core
from triton.runtime import interpreter


def hasten() -> None:
    """Let everything that depends on a type alone be worked out once."""
    _patch_language_once()
    _look_numbers_up()
    _look_shapes_up()


def _patch_language_once() -> None:
    """The first launch of a file's kernels replaces what `triton.language` has for them, for good: this process
    compiles nothing."""
    patch, seen = interpreter._patch_lang, set[int]()

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) not in seen:
            seen.add(id(function.__globals__))
            patch(function)
        return interpreter._LangPatchScope()  # with nothing to restore

    interpreter._patch_lang = patch_once


def _look_numbers_up() -> None:
    """numpy's type for each of Triton's."""
    find, found = interpreter._get_np_dtype, dict[str, Any]()

    def find_once(kind: Any) -> Any:
        element = kind.scalar
        if element.name not in found:
            found[element.name] = find(element)
        return found[element.name]

    interpreter._get_np_dtype = find_once


def _look_shapes_up() -> None:
    """What a shape is in types of blocks, and in tensors: a tuple of Triton's, which has a type of its own."""
    begin_block, begin_tensor = core.block_type.__init__, core.tensor.__init__
    blocks, tensors = dict[tuple[int, ...], Any](), dict[tuple[int, ...], Any]()

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(map(core._unwrap_if_constexpr, shape))
        if sizes in blocks:
            self.element_ty = element_ty
            self.shape, self.numel, text = blocks[sizes]
            self.name = f"<{text}, {element_ty}>"
        else:
            begin_block(self, element_ty, shape)
            blocks[sizes] = self.shape, self.numel, str(self.shape)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes in tensors:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = tensors[sizes]
        else:
            begin_tensor(self, handle, type)
            tensors[sizes] = self.shape, self.numel

    core.block_type.__init__, core.tensor.__init__ = block, tensor
