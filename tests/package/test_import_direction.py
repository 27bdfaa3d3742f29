"""Who may import whom, and what `import extrope_kernels` may not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import extrope_kernels

PACKAGE = "extrope_kernels"
ROOT = Path(extrope_kernels.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
AXES = (
    "methods",
    "positions",
    "scores",
)  # pure functions: torch, the standard library, and themselves
CLIENTS = ("integrations", "evaluation", "cli", "__main__")
IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda", "flash_attn")
INSTALLATION = ("_build", "_ext")  # where the compiled libraries are: knows no op
OPTIONAL = {"triton", "transformers", "flash_attn", "flash_attn_interface"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGE, *parts)).removesuffix(".__init__")


def is_module(name):
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def absolute(node, path):
    """The modules that an import statement names, `from package import submodule` resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    base = package[: len(package) - node.level + 1] if node.level else []
    source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
    if source.split(".")[0] != PACKAGE:
        return [source]
    names = [f"{source}.{alias.name}" for alias in node.names]
    return [name if is_module(name) else source for name in names]


def imports(path, at_import_time=False):
    """Yield the absolute names of the modules that a file imports."""
    stack = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from absolute(node, path)
        elif at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            stack.extend(node.orelse)
        else:
            stack.extend(ast.iter_child_nodes(node))


def under(name, *folders):
    return any(f"{name}.".startswith(f"{PACKAGE}.{folder}.") for folder in folders)


def place(path):
    """Return (axis or op, rest): ("methods", "yarn.py"), ("ops/rope", "triton.py"), ..."""
    parts = path.relative_to(ROOT).parts
    is_op = parts[0] == "ops" and len(parts) > 2 and not parts[1].startswith("_")
    depth = 2 if is_op else 1
    return "/".join(parts[:depth]), parts[depth:]


def named(paths):
    return pytest.mark.parametrize("path", [pytest.param(p, id=module_name(p)) for p in paths])


@named(path for path in FILES if place(path)[0] in AXES)
def test_the_axes_import_torch_alone(path):
    axis = place(path)[0]
    for name in imports(path):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names or top == "torch" or under(name, axis, "_checks"), (
            name
        )


OP_FILES = [path for path in FILES if place(path)[0].startswith("ops/")]


@named(OP_FILES)
def test_an_op_never_imports_another(path):
    op = place(path)[0].split("/")[1]
    others = {place(other)[0].split("/")[1] for other in OP_FILES} - {op}
    for name in imports(path):
        assert not under(name, *(f"ops.{other}" for other in others)), name


@named(path for path in OP_FILES if place(path)[1][0].removesuffix(".py") in IMPLEMENTATIONS)
def test_implementations_never_import_one_another(path):
    op, (first, *_) = place(path)
    others = [name for name in IMPLEMENTATIONS if name != first.removesuffix(".py")]
    for name in imports(path):
        assert not under(name, *(f"{op.replace('/', '.')}.{other}" for other in others)), name
        assert not under(name, *AXES, f"{op.replace('/', '.')}.api"), name


@named(path for path in FILES if place(path)[0].removesuffix(".py") in CLIENTS)
def test_clients_use_the_public_api(path):
    public = {PACKAGE, *(f"{PACKAGE}.{axis}" for axis in AXES)}
    public |= {f"{PACKAGE}.{place(op_file)[0].replace('/', '.')}" for op_file in OP_FILES}
    for name in imports(path):
        if name.split(".")[0] == PACKAGE:
            assert name in public or under(name, *CLIENTS, *INSTALLATION), name


@named(path for path in FILES if place(path)[0].removesuffix(".py") not in CLIENTS)
def test_nothing_imports_the_clients(path):
    for name in imports(path):
        assert not under(name, *CLIENTS), name


@named(path for path in FILES if not {"triton.py", "triton"} & set(path.parts))
def test_optional_packages_are_imported_inside_functions(path):
    for name in imports(path, at_import_time=True):
        assert name.split(".")[0] not in OPTIONAL, name


def test_importing_the_package_loads_no_optional_package():
    code = (
        f"import sys, {PACKAGE}, {PACKAGE}.cli, {PACKAGE}.integrations.transformers\n"
        f"sys.exit(', '.join({OPTIONAL!r} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
