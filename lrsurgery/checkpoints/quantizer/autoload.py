"""Registration of the checkpoint format with transformers, in every process of an environment that has lrsurgery.

The wheel has this file a second time, beside the package, and a .pth file that calls `install` as Python starts. An
entry point of torch would do as well, but where one fails, such as that of an editable install whose folder has moved,
torch cannot be imported at all. The package itself is imported only once transformers has loaded its quantizers, from
wherever it is found then.

Every start of Python runs this file, so it imports nothing that Python has not loaded by then.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from typing import Any

# module -> what is imported when that is loaded: the quantizer, the methods of models that call it, and timm's answer
WATCHED = {
    "transformers.quantizers.auto": "lrsurgery.checkpoints.quantizer.method",
    "transformers.modeling_utils": "lrsurgery.checkpoints.pretrained.classes",
    "timm.models._builder": "lrsurgery.checkpoints.pretrained.refusal",
}
said: "list[bool]" = []  # once is enough


class Hook:
    """A finder in front of the others, which lets them find what is `WATCHED`, and registers the format afterwards."""

    watched = WATCHED

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        if name not in WATCHED:
            return None
        others = (finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec: ModuleSpec | None = next((found for find in others if (found := find(name, path, target))), None)
        try:
            _follow(spec)
        except Exception as e:
            _warn(e)
        return spec


def install() -> None:
    """Register the format now as far as transformers is loaded, and the rest as soon as it is. Never raises."""
    for name in WATCHED:
        if name in sys.modules:
            _register(name)
    if not any(getattr(finder, "watched", None) == WATCHED for finder in sys.meta_path):
        sys.meta_path.insert(0, Hook())  # type: ignore[arg-type]


def _follow(spec: "Any") -> None:
    """Let the loader of a module register the format when it has executed it."""
    if spec is None or spec.loader is None:
        return
    execute = spec.loader.exec_module

    def execute_and_register(module: "Any") -> None:
        execute(module)
        if module.__name__ in WATCHED:  # a loader of zip files has other modules, too
            _register(module.__name__)

    spec.loader.exec_module = execute_and_register


def _register(name: str) -> None:
    if os.environ.get("LRSURGERY_AUTOLOAD") == "0" or os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        return
    try:
        from importlib import import_module

        import_module(WATCHED[name])
    except Exception as e:  # nobody's transformers may fail because of a broken lrsurgery
        _warn(e)


def _warn(error: Exception) -> None:
    # no warning: transformers ignores those of its imports, and they may be errors
    if sys.stderr is not None and not said:
        said.append(True)
        sys.stderr.write(
            f"lrsurgery cannot register its checkpoint format with transformers ({type(error).__name__}: {error});"
            " install it again, or set LRSURGERY_AUTOLOAD=0\n"
        )
