"""Carries edits out with libcst, which keeps comments, formatting, encoding and line ends. The only module that imports it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

try:
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
except ModuleNotFoundError as _error:  # pragma: no cover  # a test hides the library in a process of its own
    from safedefer.errors import MissingExtra

    raise MissingExtra("migrate", "safedefer migrate-code") from _error

from safedefer.migrate.edits import CallEdit, Edits, ImportEdit, Piece, Span
from safedefer.migrate.names import Names

_Small: TypeAlias = cst.BaseSmallStatement | cst.FlattenSentinel[cst.BaseSmallStatement] | cst.RemovalSentinel
_Line: TypeAlias = cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement] | cst.RemovalSentinel
_BOM: Final = b"\xef\xbb\xbf"


class Unapplied(Exception):
    """An edit met nothing: the trees of ast and libcst disagree on the file."""


def rewrite(data: bytes, edits: Edits) -> tuple[bytes, int]:
    """Return the bytes of a file with its edits, and how many there were.

    Raises:
        Unapplied: An edit met nothing.
        libcst.ParserSyntaxError: libcst does not parse the file.
    """
    bom = _BOM if data.startswith(_BOM) else b""
    module = cst.parse_module(data[len(bom) :])
    wrapper = MetadataWrapper(module, unsafe_skip_copy=True)
    editor = _Editor(edits)
    changed = wrapper.visit(editor)
    left = editor.left()
    if left:
        raise Unapplied(f"nothing was found in line {min(left).line}")
    changed = _with_imports(changed, edits.imports)
    changed = _without_unused(changed, edits.maybe_unused)
    return bom + changed.bytes, editor.count


class _Editor(cst.CSTTransformer):
    """Replaces what stands at the places of the edits."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, edits: Edits) -> None:
        super().__init__()
        self._edits = edits
        self._done: set[Span] = set()
        self.count = 0

    def left(self) -> set[Span]:
        """Return the places of edits that met nothing."""
        edits = self._edits
        return {*edits.calls, *edits.names, *edits.decorators, *edits.statements} - self._done

    def _span(self, node: cst.CSTNode) -> Span:
        place: Any = self.get_metadata(PositionProvider, node)
        return Span(place.start.line, place.start.column, place.end.line, place.end.column)

    def _meets(self, node: cst.CSTNode, edits: Any) -> Any:
        """Return the edit of a node, which is then done; None if there is none."""
        span = self._span(node)
        if span not in edits:
            return None
        self._done.add(span)
        self.count += 1
        return edits[span] if isinstance(edits, dict) else True

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        edit = self._meets(original_node, self._edits.calls)
        return updated_node if edit is None else _new_call(updated_node, edit)

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        return self._renamed(original_node, updated_node)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        return self._renamed(original_node, updated_node)

    def _renamed(self, original: cst.Name | cst.Attribute, updated: cst.Name | cst.Attribute) -> cst.BaseExpression:
        edit = self._meets(original, self._edits.names)
        return (
            updated if edit is None else cst.parse_expression(edit).with_changes(lpar=updated.lpar, rpar=updated.rpar)
        )

    def leave_ImportFrom(self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom) -> _Small:
        edit = self._meets(original_node, self._edits.statements)
        return updated_node if edit is None else _new_from(updated_node, edit)

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> _Small:
        edit = self._meets(original_node, self._edits.statements)
        if edit is None:
            return updated_node
        names = [
            alias.with_changes(name=cst.parse_expression(edit.module)) if n in edit.moved else alias
            for n, alias in enumerate(updated_node.names)
        ]
        return updated_node.with_changes(names=names)

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> _Line:
        """Give each import a line of its own, where one became two."""
        if len(original_node.body) != 1 or len(updated_node.body) < 2:  # noqa: PLR2004  # one became two
            return updated_node
        first, *rest = updated_node.body
        lines = [updated_node.with_changes(body=[first.with_changes(semicolon=cst.MaybeSentinel.DEFAULT)])]
        lines += [cst.SimpleStatementLine([each.with_changes(semicolon=cst.MaybeSentinel.DEFAULT)]) for each in rest]
        return cst.FlattenSentinel(lines)

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        kept: list[cst.Decorator] = []
        comments: list[cst.EmptyLine] = []
        for old, new in zip(original_node.decorators, updated_node.decorators, strict=True):
            if self._meets(old.decorator, self._edits.decorators) is None:
                kept.append(new.with_changes(leading_lines=[*comments, *new.leading_lines]))
                comments = []
                continue
            comments += [line for line in new.leading_lines if line.comment is not None]
            if new.trailing_whitespace.comment is not None:
                comments.append(cst.EmptyLine(comment=new.trailing_whitespace.comment))
        if len(kept) == len(original_node.decorators):
            return updated_node
        after = [*comments, *updated_node.lines_after_decorators]
        if kept:
            return updated_node.with_changes(decorators=kept, lines_after_decorators=after)
        lines = [*updated_node.leading_lines, *after]
        return updated_node.with_changes(decorators=kept, leading_lines=lines, lines_after_decorators=[])


# --- Calls ----------------------------------------------------------------------------------------


def _new_call(call: cst.Call, edit: CallEdit) -> cst.Call:
    old = list(call.args)
    new = [arg for piece in edit.pieces for arg in _arguments(old, piece)]
    callee = cst.parse_expression(edit.callee)
    return call.with_changes(func=callee, args=_punctuated(old, new))


def _arguments(old: Sequence[cst.Arg], piece: Piece) -> list[cst.Arg]:
    """Return the arguments of a piece, with the commas of those that they come from."""
    if piece.how == "new":
        return [_keyword(piece.keyword, cst.parse_expression(piece.text))]
    arg = old[piece.at]
    if piece.how == "keep":
        return [arg]
    if piece.how == "positional":
        return [arg.with_changes(keyword=None, equal=cst.MaybeSentinel.DEFAULT)]
    if piece.how == "rename":
        return [_keyword(piece.keyword, arg.value).with_changes(comma=arg.comma)]
    if piece.how == "seconds":
        method = cst.Attribute(
            arg.value if _is_primary(arg.value) else _parenthesized(arg.value), cst.Name("total_seconds")
        )
        return [_keyword(piece.keyword, cst.Call(method))]
    if piece.how == "elements":
        assert isinstance(arg.value, cst.Tuple | cst.List)
        return [
            cst.Arg(each.value, star="*" if isinstance(each, cst.StarredElement) else "") for each in arg.value.elements
        ]
    if piece.how == "items":
        assert isinstance(arg.value, cst.Dict)
        pairs = [each for each in arg.value.elements if isinstance(each, cst.DictElement)]
        return [_keyword(str(ast.literal_eval(cst.Module([]).code_for_node(each.key))), each.value) for each in pairs]
    return [cst.Arg(arg.value, star="*" if piece.how == "star" else "**")]


def _keyword(name: str | None, value: cst.BaseExpression) -> cst.Arg:
    plain = cst.SimpleWhitespace("")
    equal = cst.AssignEqual(whitespace_before=plain, whitespace_after=plain)
    return cst.Arg(
        value,
        keyword=None if name is None else cst.Name(name),
        equal=equal if name is not None else cst.MaybeSentinel.DEFAULT,
    )


def _is_primary(value: cst.BaseExpression) -> bool:
    return bool(value.lpar) or isinstance(value, cst.Name | cst.Attribute | cst.Call | cst.Subscript)


def _parenthesized(value: cst.BaseExpression) -> cst.BaseExpression:
    return value.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])


def _punctuated(old: Sequence[cst.Arg], new: list[cst.Arg]) -> list[cst.Arg]:
    """Give the last argument what stood behind the last, and each of the others a comma as the call has them."""
    if not new:
        return []
    between = next((arg.comma for arg in old[:-1] if isinstance(arg.comma, cst.Comma)), None)
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" ")) if between is None else _bare(between)
    last = old[-1] if old else cst.Arg(cst.Name("_"))
    result = []
    for number, arg in enumerate(new, 1):
        if number == len(new):
            result.append(arg.with_changes(comma=last.comma, whitespace_after_arg=last.whitespace_after_arg))
        elif isinstance(arg.comma, cst.Comma) and arg is not last:
            result.append(arg)
        else:
            result.append(arg.with_changes(comma=comma, whitespace_after_arg=cst.SimpleWhitespace("")))
    return result


def _bare(comma: cst.Comma) -> cst.Comma:
    """Return a comma with its line break and indentation, and without the comment that belongs to another argument."""
    after = comma.whitespace_after
    if isinstance(after, cst.ParenthesizedWhitespace):
        line = cst.TrailingWhitespace(newline=after.first_line.newline)
        return comma.with_changes(whitespace_after=after.with_changes(first_line=line, empty_lines=[]))
    return comma


# --- Imports --------------------------------------------------------------------------------------


def _new_from(node: cst.ImportFrom, edit: ImportEdit) -> _Small:
    module = cst.parse_expression(edit.module)
    assert isinstance(module, cst.Name | cst.Attribute)
    if len(edit.moved) == edit.count:
        return node.with_changes(module=module, relative=[])
    assert not isinstance(node.names, cst.ImportStar)
    moved = [alias for n, alias in enumerate(node.names) if n in edit.moved]
    kept = [alias for n, alias in enumerate(node.names) if n not in edit.moved]
    end = node.names[-1].comma
    semicolon = cst.Semicolon(whitespace_after=cst.SimpleWhitespace(" "))
    if node.lpar is not None and any(_comment(alias) for alias in moved):
        first = node.with_changes(module=module, relative=[], names=_closed(moved, end), semicolon=semicolon)
    else:
        moved = [alias.with_changes(comma=cst.MaybeSentinel.DEFAULT) for alias in moved]
        first = cst.ImportFrom(module=module, names=moved, semicolon=semicolon)
    if node.lpar is None:
        kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return cst.FlattenSentinel([first, node.with_changes(names=_closed(kept, end))])


def _comment(alias: cst.ImportAlias) -> bool:
    after = alias.comma.whitespace_after if isinstance(alias.comma, cst.Comma) else None
    return isinstance(after, cst.ParenthesizedWhitespace) and after.first_line.comment is not None


def _closed(names: list[cst.ImportAlias], end: cst.Comma | cst.MaybeSentinel) -> list[cst.ImportAlias]:
    """Indent the closing parenthesis as it was: what stands before it belongs to the last name's comma."""
    comma = names[-1].comma
    own = comma.whitespace_after if isinstance(comma, cst.Comma) else None
    old = end.whitespace_after if isinstance(end, cst.Comma) else None
    if (
        not isinstance(comma, cst.Comma)
        or not isinstance(own, cst.ParenthesizedWhitespace)
        or not isinstance(old, cst.ParenthesizedWhitespace)
    ):
        return names
    space = own.with_changes(indent=old.indent, last_line=old.last_line, empty_lines=[])
    return [*names[:-1], names[-1].with_changes(comma=comma.with_changes(whitespace_after=space))]


def _with_imports(module: cst.Module, statements: Sequence[str]) -> cst.Module:
    """Add statements behind the last import at the top of the file, or behind its docstring."""
    have = {
        module.code_for_node(part).strip()
        for line in module.body
        if isinstance(line, cst.SimpleStatementLine)
        for part in line.body
    }
    missing = [cst.parse_statement(text) for text in statements if text not in have]
    if not missing:
        return module
    body = list(module.body)
    at = 0
    for number, line in enumerate(body):
        parts = line.body if isinstance(line, cst.SimpleStatementLine) else ()
        docstring = number == 0 and all(
            isinstance(each, cst.Expr) and isinstance(each.value, cst.SimpleString | cst.ConcatenatedString)
            for each in parts
        )
        if parts and (docstring or any(isinstance(each, cst.Import | cst.ImportFrom) for each in parts)):
            at = number + 1
        elif parts or at:
            break
    return module.with_changes(body=[*body[:at], *missing, *body[at:]])


def _without_unused(module: cst.Module, candidates: set[str]) -> cst.Module:
    """Leave out imports at the top of the file that bind one of these names, which nothing uses any more."""
    if not candidates:
        return module
    tree = ast.parse(module.code)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }  # __all__
    names = Names("m", tree)
    # Bound once, by an import alone: another `try: import` of the same name stays with its pair.
    unused = {name for name in candidates - used if len(names.binds(name)) == 1}
    body: list[Any] = []
    lost: list[cst.EmptyLine] = []
    for line in module.body:
        left = _left_of(line, unused) if isinstance(line, cst.SimpleStatementLine) else line
        if left is None:
            lost += line.leading_lines  # comments and empty lines go to the next statement
            continue
        body.append(left.with_changes(leading_lines=[*lost, *left.leading_lines]) if lost else left)
        lost = []
    return module.with_changes(body=body)


def _left_of(line: cst.SimpleStatementLine, unused: set[str]) -> cst.SimpleStatementLine | None:
    if len(line.body) != 1 or not isinstance(line.body[0], cst.Import | cst.ImportFrom):
        return line
    node = line.body[0]
    if isinstance(node.names, cst.ImportStar):
        return line
    kept = [alias for alias in node.names if _bound(alias) not in unused]
    if len(kept) == len(node.names):
        return line
    if not kept:
        return None
    if not isinstance(node, cst.ImportFrom) or node.lpar is None:
        kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return line.with_changes(body=[node.with_changes(names=_closed(kept, node.names[-1].comma))])


def _bound(alias: cst.ImportAlias) -> str:
    return alias.evaluated_alias or alias.evaluated_name.partition(".")[0]
