"""Random programs of branches, loops and jumps, as text: what the rewriting of control flow is tested with.

Every program is a function of one vector. Its variables are numbers of dimension 0; its loops end.
"""

import random

VARIABLES = ("a", "b", "c")


class Writer:
    """Writes one program; the same seed writes the same program."""

    def __init__(self, seed: int, *, size: int = 12) -> None:
        self.random = random.Random(seed)
        self.left = size
        self.loops = 0

    def program(self) -> str:
        lines = ["def forward(x):", "    a, b, c = x[0], x[1], x[2]", "    v = x * 1", "    w = v[1:]"]
        lines += self.block(1, in_loop=False)
        return "\n".join([*lines, "    return a + v[0], b, c + w.sum()"]) + "\n"

    def expression(self) -> str:
        one, other = self.random.choice(VARIABLES), self.random.choice(VARIABLES)
        return self.random.choice(
            [
                f"{one} * 0.5 + {other}",
                f"{one} - {other} * 0.25",
                f"({one} if {self.test()} else {other})",
                f"{one}.sin() + 0.5",
                f"torch.tanh({one} + {other})",
                f"{one} + v[1]",
                f"{one} - w.mean()",
            ]
        )

    def test(self) -> str:
        one, other = self.random.choice(VARIABLES), self.random.choice(VARIABLES)
        limit = self.random.choice([-1.0, -0.5, 0.0, 0.5, 1.0])
        return self.random.choice(
            [
                f"{one} > {limit}",
                f"{one}.item() < {limit}",
                f"{one} > {other}",
                f"not {one} > {limit}",
                f"{one} > {limit} and {other} < {-limit}",
                f"{one}.item() < {limit} or {other} > {limit}",
                f"{limit} < {one} < {limit + 1}",
            ]
        )

    def block(self, depth: int, *, in_loop: bool) -> list[str]:
        lines: list[str] = []
        for _ in range(self.random.randint(1, 3)):
            lines += self.statement(depth, in_loop=in_loop)
            self.left -= 1
        return lines

    def statement(self, depth: int, *, in_loop: bool) -> list[str]:
        pad = "    " * depth
        kinds = ["assign", "assign", "augment", "write"]
        if self.left > 0 and depth < 4:
            kinds += ["if", "if", "if else", "elif", "while", "for", "unrolled"]
        if depth > 1:
            kinds += ["return"]
        if in_loop:
            kinds += ["break", "continue"]
        kind = self.random.choice(kinds)
        name = self.random.choice(VARIABLES)
        if kind == "assign":
            return [f"{pad}{name} = {self.expression()}"]
        if kind == "augment":
            return [f"{pad}{name} = {name} + {self.random.choice(VARIABLES)} * 0.125"]
        if kind == "write":
            return [
                pad + self.random.choice([f"v[1] = {name}", f"v.mul_({name})", f"w[0] += {name}", f"v[0] = {name}"])
            ]
        if kind == "return":
            return [f"{pad}return {self.expression()}, b, {self.random.choice(VARIABLES)}"]
        if kind in ("break", "continue"):
            return [pad + kind]
        inner = self.block(depth + 1, in_loop=in_loop)
        if kind == "if":
            return [f"{pad}if {self.test()}:", *inner]
        if kind == "if else":
            return [f"{pad}if {self.test()}:", *inner, f"{pad}else:", *self.block(depth + 1, in_loop=in_loop)]
        if kind == "elif":
            other = self.block(depth + 1, in_loop=in_loop)
            return [f"{pad}if {self.test()}:", *inner, f"{pad}elif {self.test()}:", *other]
        return self.loop(kind, pad, depth)

    def loop(self, kind: str, pad: str, depth: int) -> list[str]:
        self.loops += 1
        turn = f"turn_{self.loops}"
        body = self.block(depth + 1, in_loop=True)
        if kind == "while":
            step = f"{pad}    {turn} = {turn} + 1"
            return [f"{pad}{turn} = 0", f"{pad}while {turn} < 4 and ({self.test()}):", step, *body]
        if kind == "for":
            return [f"{pad}for {turn} in range(int(x[3]) + 2):", f"{pad}    a = a + {turn} * 0.1", *body]
        return [f"{pad}for {turn} in range(3):", *body]


def random_program(seed: int) -> str:
    """Return the text of a program."""
    return Writer(seed).program()
