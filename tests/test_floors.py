"""A file imports from its own package or from lower floors; what is on no floor does not exist."""

import ast
from pathlib import Path

import offline_cai

PACKAGE = Path(offline_cai.__file__).parent
FLOORS = [
    {"errors", "files", "interrupts", "provenance", "core", "config", "export", "seeding", "spaces", "inference"},
    {"data", "networks", "environments"},
    {"diffusion"},
    {"planning", "policies"},
    {"algorithms"},
    {"evaluation"},
    {"training"},
    {
        "behaviours",
        "collect",
        "commands",
        "data_commands",
        "evaluation_commands",
        "demo",
        "report",
        "scoreboard",
        "parsers",
        "cli",
        "__main__",
    },
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(path: Path) -> set[str]:
    """The parts of offline_cai that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "offline_cai":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("offline_cai.")}
    return found - {"__version__"}


def test_files_import_from_their_own_package_or_from_lower_floors() -> None:
    broken = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own != "__init__":
            same_floor = FLOORS[0] | FLOORS[-1]  # single files, which may use each other
            broken += [
                f"{path.relative_to(PACKAGE)} imports {other}"
                for other in imports(path) - {own}
                if FLOOR[other] > FLOOR[own] or (FLOOR[other] == FLOOR[own] and other not in same_floor)
            ]
    assert not broken


def test_tests_mirror_the_floors() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("__pycache__", "recipes")}
    assert folders <= {path.name for path in Path(__file__).parent.iterdir() if path.is_dir()}


def test_recipe_folders_are_no_packages() -> None:
    root = PACKAGE.parent
    assert not [name for name in ("datasets", "configs", "eval") if (root / name / "__init__.py").exists()]
