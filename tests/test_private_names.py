"""No private name of torch and no patched forward, in the package, the examples, the tests and the benchmarks.

Private names change without notice from one release to the next, and a forward that is put into an instance is seen by
nobody who reads the class.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("hsat", "examples", "tests", "benchmarks") for path in (ROOT / room).rglob("*.py"))
EXEMPT = {
    "tests/test_private_names.py",  # holds wrong lines itself
}
LIBRARIES = ("torch", "torchvision")
SETTERS = ("setattr", "__setattr__", "delattr", "object", "pop")  # object: of unittest.mock.patch
READERS = (*SETTERS, "getattr", "hasattr", "attrgetter", "get")
IN_TEXT = re.compile(r"\b(?:torch|torchvision)(?:\.\w+)*\._(?!_)\w+")
PATCHED = ("forward", "__call__")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _private_attributes() -> set[str]:
    """What objects of torch carry for torch alone, on whatever variable it is asked of."""
    loader = DataLoader(TensorDataset(torch.zeros(1)))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    owners = [torch.zeros(1), nn.Parameter(torch.zeros(1)), nn.Linear(1, 1), loader, iter(loader), optimizer]
    owners += [torch.Generator(), torch.autograd.Function, nn.parallel.DistributedDataParallel]
    names = {name for owner in owners for name in dir(owner) if is_private(name)}
    return names | {"_version", "_compiled_call_impl", "_orig_mod", "_shutdown_workers"}


PRIVATE = _private_attributes()


def _names_from_torch(tree: ast.AST) -> set[str]:
    """What modules and things of torch are called in a file."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = [alias for alias in node.names if alias.name.split(".")[0] in LIBRARIES]
            names |= {alias.asname or alias.name.split(".")[0] for alias in roots}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _own_names(tree: ast.AST) -> set[str]:
    """Private names that classes of a file give themselves: `self._values` is then theirs and not a tensor's."""
    methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    stored = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return methods | stored


def _texts(node: ast.AST) -> list[str]:
    """Attributes that a call or a subscript names by a string: setattr(x, "name", ...), vars(x)["name"]."""
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        candidates: list[ast.expr] = list(node.args) if called in READERS else []
    elif isinstance(node, ast.Subscript) and re.search(r"__dict__$|^vars\(", ast.unparse(node.value)):
        candidates = [node.slice]
    else:
        candidates = []
    return [each.value for each in candidates if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def _is_patch(node: ast.AST) -> bool:
    """Whether a forward is put into an object: x.forward = f, vars(x)["forward"] = f, setattr(x, "forward", f)."""
    if isinstance(node, ast.Attribute):
        return node.attr in PATCHED and isinstance(node.ctx, ast.Store | ast.Del)
    if isinstance(node, ast.Subscript):
        return isinstance(node.ctx, ast.Store | ast.Del) and any(text in PATCHED for text in _texts(node))
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return called in SETTERS and any(text.split(".")[-1] in PATCHED for text in _texts(node))
    return False


def wrong_lines(source: str) -> Iterator[str]:
    """One text per private name of torch and per patched forward."""
    tree = ast.parse(source)
    known, own = _names_from_torch(tree), _own_names(tree)
    for number, line in enumerate(source.splitlines(), 1):
        for match in IN_TEXT.finditer(line):
            yield f"line {number}: {match[0]}"
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', 0)}"
        for name in _imported(node):
            if name.split(".")[0] in LIBRARIES and any(map(is_private, name.split("."))):
                yield f"{where}: import of {name}"
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            root = dotted.split(".")[0] if re.fullmatch(r"[\w.]+", dotted) else ""
            its_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own
            if (node.attr in PRIVATE and not its_own) or (root in known and is_private(node.attr)):
                yield f"{where}: {dotted}"
        for text in _texts(node):
            if text in PRIVATE:
                yield f"{where}: {text} by its name"
        if _is_patch(node):
            yield f"{where}: a forward is patched"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_torch_and_no_patched_forward(path):
    if str(path.relative_to(ROOT)) not in EXEMPT:
        assert not list(wrong_lines(path.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "import torch._dynamo as dynamo",
        "def f():\n    from torch._utils import ExceptionWrapper",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "import torch\ntorch._dynamo.reset()",
        "import torch\ntorch._C._get_tracing_state()",
        "import torch\ntorch.ops.mkldnn._convolution_pointwise(x)",
        "import torch as t\nt.autograd.forward_ad._current_level",
        "from torch import nn\nisinstance(part, nn.modules.batchnorm._BatchNorm)",
        "import importlib\nimportlib.import_module('torch._inductor')",
        "monkeypatch.setattr('torch._dynamo.reset', print)",
        "if images._version != before:\n    pass",
        "made = [(output, output._version)]",
        "encoder._forward_hooks or encoder._forward_pre_hooks",
        "model.layer1[0]._parameters.items()",
        "getattr(model, '_orig_mod', model)",
        "model._orig_mod",
        "model._compiled_call_impl = None",
        "vars(model)['_buffers']",
        "loader._shutdown_workers()",
        "class A(nn.Module):\n    def f(self):\n        return self._modules",
        "model.forward = forward",
        "model.layer[3].forward = lambda x: x",
        "del model.forward",
        "model.__call__ = forward",
        "part.__dict__['forward'] = fast",
        "part.__dict__.pop('forward')",
        "vars(part)['forward'] = fast",
        "setattr(part, 'forward', fast)",
        "object.__setattr__(part, 'forward', fast)",
        "monkeypatch.setattr(encoder, 'forward', fast)",
        "monkeypatch.setattr('hsat.models.Encoder.forward', fast)",
        "mock.patch.object(encoder, 'forward', fast)",
    ],
)
def test_a_wrong_line_would_be_seen(source):
    assert list(wrong_lines(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nprint(torch.__version__)",
        "state = {key.removeprefix('_orig_mod.'): value for key, value in state.items()}",
        "class A(nn.Module):\n    def forward(self, x):\n        return super().forward(x)",
        "y = type(layer).forward(layer, x)",
        "class A:\n    def __init__(self):\n        self._buffers = list(module.buffers())",
        "'forward' in vars(encoder)",
        "records[0]._replace(split='')",
        "torch.compiler.reset()",
        "model.compile()",
    ],
)
def test_a_right_line_passes(source):
    assert not list(wrong_lines(source))


def test_every_exempt_file_is_there():
    assert EXEMPT <= {str(path.relative_to(ROOT)) for path in FILES}
