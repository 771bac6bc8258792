"""The exceptions: the names that users import, the builtin classes they may catch instead, and the tree in the docs."""

from __future__ import annotations

import inspect

import pytest

from mini_infer import exceptions
from mini_infer.exceptions import (
    BlockError,
    ConfigError,
    EngineBusyError,
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    MiniInferError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedModelError,
)

BUILTIN_OF = {
    ConfigError: ValueError,
    ModelNotFoundError: FileNotFoundError,
    UnsupportedModelError: ValueError,
    InvalidRequestError: ValueError,
    OutOfMemoryError: MemoryError,
    BlockError: ValueError,
    EngineClosedError: RuntimeError,
    EngineBusyError: RuntimeError,
    EngineDeadError: RuntimeError,
}


@pytest.mark.parametrize(("error", "builtin"), BUILTIN_OF.items())
def test_each_is_ours_and_a_builtin(error: type[MiniInferError], builtin: type[Exception]) -> None:
    assert error.__bases__ == (MiniInferError, builtin)
    with pytest.raises(builtin, match="what happened"):
        raise error("what happened")
    assert str(error("what happened")) == "what happened"


def test_the_users_example_tells_them_apart() -> None:
    """`except OutOfMemoryError ... except InvalidRequestError ... except ModelNotFoundError`: none shadows another."""
    documented = (OutOfMemoryError, InvalidRequestError, ModelNotFoundError)
    for error in documented:
        assert [issubclass(error, other) for other in documented].count(True) == 1


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    defined = {
        name: cls
        for name, cls in vars(exceptions).items()
        if inspect.isclass(cls) and issubclass(cls, Exception) and cls.__module__ == exceptions.__name__
    }
    assert set(defined.values()) == {MiniInferError, *BUILTIN_OF}, "an exception is not tested here"
    lines = (exceptions.__doc__ or "").splitlines()
    for cls, builtin in BUILTIN_OF.items():
        assert any(f"── {cls.__name__} ({builtin.__name__})" in line for line in lines), f"{cls.__name__} is not drawn"
    assert all(cls.__doc__ for cls in defined.values())


def test_an_error_in_one_line() -> None:
    assert exceptions.describe(ValueError("what happened")) == "ValueError: what happened"
    assert exceptions.describe(KeyboardInterrupt()) == "KeyboardInterrupt"
