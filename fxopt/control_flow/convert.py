"""Rewrite one function so that its branches and loops ask fxopt how to run.

    before:  if x.norm() > 1: x = x / 2     after:  def side(): nonlocal x; x = x / 2
                                                    def other(): pass
                                                    __fxopt__.if_(x.norm() > 1, side, other, State(get, set, ...), ...)

On Python values the rewritten function does what it did. On tensors ``if_`` runs both sides, which only works because
both are functions by then and because ``get`` and ``set`` can put the local names back in between. The names, the
lines and the file of the user's code stay: whatever is traced points at the line that the user wrote.
"""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Sequence

from fxopt.control_flow.appended import bind_appended
from fxopt.control_flow.jumps import Unsupported, lower_jumps, negated_any, own_nodes
from fxopt.control_flow.liveness import assigned, locals_of, mark_live, mutated, read
from fxopt.control_flow.syntax import constant, expression, statement

__all__ = ["RUNTIME", "converted_code"]

RUNTIME = "__fxopt__"
_ASKED_BUILTINS = {
    "int", "float", "bool", "range", "enumerate", "zip", "min", "max", "abs", "round", "any", "all", "print", "len",
    "list", "tuple", "reversed",
}  # fmt: skip


def converted_code(function: ast.FunctionDef, code: types.CodeType) -> types.CodeType:
    """Return the code object of the rewritten function, which can take the place of ``code``.

    Args:
        function: The function as parsed from its file; changed in place.
        code: Its own code object, for its free variables and its name.

    Raises:
        Unsupported: a statement has no structured form.
    """
    for node in own_nodes(function.body):
        if isinstance(node, ast.Yield | ast.YieldFrom | ast.Await):
            raise Unsupported("a generator or a coroutine", node)
    _Mangle(code.co_qualname).visit(function)
    _convert(function, code.co_filename)
    function.decorator_list = []
    function.returns = None
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    # Defaults live on the function object, which stays; here they only keep the argument counts apart.
    arguments.defaults = [constant(None, function) for _ in arguments.defaults]
    arguments.kw_defaults = [None for _ in arguments.kw_defaults]
    free = ", ".join(code.co_freevars)
    module = ast.parse(f"def _fx_closure({free}): pass")
    outer = module.body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [function]
    ast.fix_missing_locations(module)
    compiled = compile(module, code.co_filename, "exec", dont_inherit=True, flags=code.co_flags & _FUTURES)
    closure = next(item for item in compiled.co_consts if isinstance(item, types.CodeType))
    new = next(item for item in closure.co_consts if isinstance(item, types.CodeType))
    if new.co_freevars != code.co_freevars:
        raise Unsupported(f"free variables {new.co_freevars} instead of {code.co_freevars}", function)
    return _renamed(new, code.co_name).replace(co_qualname=code.co_qualname, co_firstlineno=code.co_firstlineno)


_FUTURES = 0x1000000  # from __future__ import annotations


def _renamed(code: types.CodeType, name: str) -> types.CodeType:
    """Return the code with every function that the rewriting made called after the function it was made from."""
    inner = tuple(
        _renamed(item, name if item.co_name.startswith("_fx_") else item.co_name)
        if isinstance(item, types.CodeType)
        else item
        for item in code.co_consts
    )
    return code.replace(co_name=name, co_consts=inner)


class _Mangle(ast.NodeTransformer):
    """Give private names the form that they have inside their class, which the rewritten function stands outside of."""

    def __init__(self, qualname: str) -> None:
        parts = qualname.split(".")
        owner = parts[-2] if len(parts) > 1 and parts[-2] != "<locals>" else ""
        self.prefix = "_" + owner.lstrip("_") if owner.strip("_") else ""

    def _mangled(self, name: str) -> str:
        private = self.prefix and name.startswith("__") and not name.endswith("__")
        return self.prefix + name if private else name

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.attr = self._mangled(node.attr)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._mangled(node.id)
        return node


def _convert(function: ast.FunctionDef, filename: str) -> None:
    inner = [node for node in own_nodes(function.body) if isinstance(node, ast.FunctionDef)]
    bind_appended(function, RUNTIME)
    lower_jumps(function)
    mark_live(function)
    names = sorted(locals_of(function))
    function.body = _Converter(function, filename).block(function.body)
    if names:  # a name that only a side binds must still be a local of the function
        function.body.insert(0, statement(f"if 0: {' = '.join(names)} = None", function.body[0]))
    for nested in inner:
        _convert(nested, filename)


class _Converter(ast.NodeTransformer):
    def __init__(self, function: ast.FunctionDef, filename: str) -> None:
        self.filename = filename
        self.function = function
        self.locals = locals_of(function)
        self.globals: set[str] = set()
        self.nonlocals: set[str] = set()
        for node in own_nodes(function.body):
            if isinstance(node, ast.Global):
                self.globals |= set(node.names)
            elif isinstance(node, ast.Nonlocal):
                self.nonlocals |= set(node.names)
        parameters = [*function.args.posonlyargs, *function.args.args]
        self.first = parameters[0].arg if parameters else None
        self.count = 0

    # ---- statements

    def block(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        new: list[ast.stmt] = []
        for one in statements:
            made = self.visit(one)
            new += made if isinstance(made, list) else [made]
        return new

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node  # a function of its own, converted by itself

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if _is_plain(node.test):
            node.test = self.visit(node.test)
            node.body, node.orelse = self.block(node.body), self.block(node.orelse)
            return node
        number, both = self._number(), [*node.body, *node.orelse]
        names = self._names(assigned(both))
        made = [
            self._function(f"_fx_side_{number}", "", node.body, names, node),
            self._function(f"_fx_other_{number}", "", node.orelse, names, node),
            *self._state(number, names, node.live & names, both, node),  # type: ignore[attr-defined]  # set by mark_live
        ]
        call = f"{RUNTIME}.if_(_fx_test, _fx_side_{number}, _fx_other_{number}, _fx_state_{number}, {self._at(node)})"
        return [*made, self._with_test(call, self.test(node.test), node)]

    def visit_While(self, node: ast.While) -> list[ast.stmt]:
        number = self._number()
        names = self._names(assigned(node.body) | (mutated(node.body) & self.locals))
        live: set[str] = node.live_head & names  # type: ignore[attr-defined]  # set by mark_live
        made = self._state(number, names, live, [node.test, *node.body], node)
        flags: list[str] = node.flags  # type: ignore[attr-defined]  # set by lower_jumps
        test = node.test
        if flags:
            test = ast.copy_location(ast.BoolOp(ast.And(), [negated_any(flags, node), test]), node)
        ask = ast.copy_location(ast.Return(test), node)
        made.append(self._function(f"_fx_asks_{number}", "", [ask], set(), node, test=True))
        made.append(self._function(f"_fx_body_{number}", "", node.body, names, node))
        call = f"{RUNTIME}.while_(_fx_asks_{number}, _fx_body_{number}, _fx_state_{number}, {self._at(node)})"
        return [*made, statement(call, node)]

    def visit_For(self, node: ast.For) -> list[ast.stmt]:
        number = self._number()
        whole: list[ast.stmt] = node.body
        names = self._names(assigned([node.target, *whole]) | (mutated(whole) & self.locals))
        live: set[str] = node.live_head & names  # type: ignore[attr-defined]  # set by mark_live
        made = self._state(number, names, live, whole, node)
        flags: list[str] = node.flags  # type: ignore[attr-defined]  # set by lower_jumps
        goes = "None"
        if flags:
            goes = f"_fx_asks_{number}"
            ask = ast.copy_location(ast.Return(negated_any(flags, node)), node)
            made.append(self._function(goes, "", [ask], set(), node, test=True))
        item = ast.copy_location(ast.Name("_fx_item", ast.Load()), node)
        take = ast.copy_location(ast.Assign([node.target], item), node)
        made.append(self._function(f"_fx_body_{number}", "_fx_item", [take, *whole], names, node))
        call = f"{RUNTIME}.for_(_fx_test, _fx_body_{number}, {goes}, _fx_state_{number}, {self._at(node)})"
        return [*made, self._with_test(call, self.visit(node.iter), node)]

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        message = ast.unparse(self.visit(node.msg)) if node.msg is not None else repr(ast.unparse(node.test))
        call = f"{RUNTIME}.assert_(_fx_test, lambda: {message}, {self._at(node)})"
        return self._with_test(call, self.test(node.test), node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if node.exc is not None:
            wrapped = expression(f"{RUNTIME}.raised(_fx_test)", node)
            assert isinstance(wrapped, ast.Call)
            wrapped.args = [self.visit(node.exc)]
            node.exc = wrapped
        return node

    # ---- expressions

    def test(self, node: ast.expr) -> ast.expr:
        """Return a test, converted: of ``and``, ``or`` and ``not`` only the truth is asked for."""
        if isinstance(node, ast.BoolOp) and not any(map(_binds, node.values[1:])):
            return self._shortcut(node, [self.test(value) for value in node.values], "truth_")
        converted: ast.expr = self.visit(node)
        return converted

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        if _is_plain(node) or any(map(_binds, node.values[1:])):
            return self.generic_visit(node)
        return self._shortcut(node, [self.visit(value) for value in node.values], "")

    def _shortcut(self, node: ast.BoolOp, values: list[ast.expr], kind: str) -> ast.expr:
        name = kind + ("and_" if isinstance(node.op, ast.And) else "or_")
        call = expression(f"{RUNTIME}.{name}({self._at(node)})", node)
        assert isinstance(call, ast.Call)
        call.args += [values[0], *(_delayed(value) for value in values[1:])]
        return call

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        if not isinstance(node.op, ast.Not) or _is_plain(node.operand):
            return self.generic_visit(node)
        call = expression(f"{RUNTIME}.not_()", node)
        assert isinstance(call, ast.Call)
        call.args = [self.test(node.operand)]
        return call

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        if _is_plain(node.test) or _binds(node.body) or _binds(node.orelse):
            return self.generic_visit(node)
        call = expression(f"{RUNTIME}.if_expression({self._at(node)})", node)
        assert isinstance(call, ast.Call)
        call.args = [
            self.test(node.test),
            _delayed(self.visit(node.body)),
            _delayed(self.visit(node.orelse)),
            *call.args,
        ]
        return call

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if len(node.ops) < 2 or _binds(node):
            return self.generic_visit(node)
        operands = [node.left, *node.comparators]
        names = [f"_fx_{index}" for index in range(len(operands))]
        loads: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names]
        pairs: list[ast.expr] = [
            ast.Compare(loads[index], [op], [loads[index + 1]]) for index, op in enumerate(node.ops)
        ]
        inner = ast.fix_missing_locations(ast.copy_location(ast.BoolOp(ast.And(), pairs), node))
        call = expression(f"(lambda {', '.join(names)}: None)()", node)
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Lambda)
        call.func.body = self.visit(inner)
        call.args = [self.visit(operand) for operand in operands]
        return call

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Name) and function.id not in self.locals:
            if function.id == "super" and not node.args and self.first:
                node.args = [expression("__class__", node), expression(self.first, node)]
            elif function.id in _ASKED_BUILTINS and hasattr(builtins, function.id):
                return self._asked(node)
            elif hasattr(builtins, function.id):
                return node
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "math":
            return self._asked(node)
        if any(not isinstance(given, ast.Constant) for given in (*node.args, *(k.value for k in node.keywords))):
            node.args, node.func = [function, *node.args], expression(f"{RUNTIME}.invoke", node)
        return node

    def _asked(self, node: ast.Call) -> ast.expr:
        call = expression(f"{RUNTIME}.call()", node)
        assert isinstance(call, ast.Call)
        name = constant(ast.unparse(node.func), node)
        call.args, call.keywords = [name, node.func, self._at_node(node), *node.args], node.keywords
        return call

    # ---- parts

    def _number(self) -> int:
        self.count += 1
        return self.count

    def _names(self, found: set[str]) -> set[str]:
        return {name for name in found if name in self.locals | self.globals | self.nonlocals}

    def _declared(self, names: set[str], at: ast.AST) -> list[ast.stmt]:
        own, shared = sorted(names - self.globals), sorted(names & self.globals)
        lines = [f"nonlocal {', '.join(own)}"] if own else []
        lines += [f"global {', '.join(shared)}"] if shared else []
        return [statement(line, at) for line in lines]

    def _function(
        self, name: str, parameter: str, body: Sequence[ast.stmt], names: set[str], at: ast.AST, *, test: bool = False
    ) -> ast.stmt:
        made = statement(f"def {name}({parameter}): pass", at)
        assert isinstance(made, ast.FunctionDef)
        if test:
            (asked,) = body
            assert isinstance(asked, ast.Return)
            assert asked.value is not None
            asked.value = self.test(asked.value)
            made.body = [asked]
        else:
            used = self._names(assigned(list(body)))
            made.body = [*self._declared(used & names, at), *self.block(body)] or [statement("pass", at)]
            if not body:
                made.body = [statement("pass", at)]
        return made

    def _state(
        self, number: int, names: set[str], live: set[str], body: Sequence[ast.AST], at: ast.AST
    ) -> list[ast.stmt]:
        """Return statements that make the state: how to read and write the names, and what else the body reads."""
        ordered = sorted(names)
        looks = sorted(self._names(read(body)) - names)
        always = live | (names & (self.globals | self.nonlocals))
        puts = "\n".join(
            f"    {name} = _fx_values[{index}]\n    if {name} is {RUNTIME}.UNDEFINED: del {name}"
            for index, name in enumerate(ordered)
        )
        takes = ", ".join(f"{RUNTIME}.peek(lambda: {name})" for name in ordered)
        seen = ", ".join(f"{RUNTIME}.peek(lambda: {name})" for name in looks)
        put = statement(f"def _fx_put_{number}(_fx_values):\n{puts or '    pass'}", at)
        assert isinstance(put, ast.FunctionDef)
        put.body = [*self._declared(names, at), *put.body]
        made = statement(
            f"_fx_state_{number} = {RUNTIME}.State({ordered!r}, {sorted(always)!r}, lambda: [{takes}], "
            f"_fx_put_{number}, lambda: [{seen}])",
            at,
        )
        return [put, made]

    def _at(self, node: ast.AST) -> str:
        return repr((self.filename, getattr(node, "lineno", 0), self.function.name))

    def _at_node(self, node: ast.AST) -> ast.expr:
        return expression(self._at(node), node)

    def _with_test(self, call: str, test: ast.expr, at: ast.AST) -> ast.stmt:
        """Return the statement ``call`` with the expression ``test`` in the place of ``_fx_test``."""
        made = statement(call, at)
        assert isinstance(made, ast.Expr)
        assert isinstance(made.value, ast.Call)
        made.value.args[0] = test
        return made


def _is_plain(test: ast.expr) -> bool:
    """Return whether a test surely yields a Python bool: no tensor says ``is None`` or ``isinstance``."""
    if isinstance(test, ast.Constant):
        return True
    if isinstance(test, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in test.ops)
    if isinstance(test, ast.BoolOp):
        return all(_is_plain(value) for value in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _is_plain(test.operand)
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name):
        return test.func.id in ("isinstance", "hasattr", "callable", "issubclass")
    return isinstance(test, ast.Attribute) and test.attr == "training"


def _binds(node: ast.AST) -> bool:
    return any(isinstance(part, ast.NamedExpr | ast.Await | ast.Yield) for part in ast.walk(node))


def _delayed(value: ast.expr) -> ast.expr:
    made = expression("lambda: None", value)
    assert isinstance(made, ast.Lambda)
    made.body = value
    return made
