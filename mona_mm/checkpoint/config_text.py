"""Read the text of a config, as checkpoints and logs hold it, without executing it."""

import ast
from typing import Any


def parse_config(text: str) -> dict[str, Any] | None:
    """Parse the top-level values of a printed or dumped config without executing it; None if it is not a config."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = _literal(node.value)
    return values or None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == 'dict' and not node.args and all(k.arg for k in node.keywords):
            return {k.arg: _literal(k.value) for k in node.keywords}
        if node.func.id == 'range':
            return list(range(*(_literal(arg) for arg in node.args)))
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    if isinstance(node, ast.Dict) and all(node.keys):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True)}
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
