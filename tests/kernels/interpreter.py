"""Triton's interpreter without the third of its time in which it looks through its own language again."""

from typing import Any

from triton import language
from triton.runtime import interpreter


def hasten() -> None:
    """Let calls of device functions replace nothing: the launch has replaced what `triton.language` has for them."""
    patch = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        modules = [m for m in function.__globals__.values() if m is language or m is language.core]
        if modules and not any(language.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()  # with nothing to restore
        return patch(function)

    interpreter._patch_lang = patch_once
