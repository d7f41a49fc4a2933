"""The best placement there is, by HiGHS: the yardstick of the planner on cases small enough to be solved. One layer.

Variables: x_er, whether rank r holds expert e. Prefill: w_erc, whether it does and e has c copies, so that its share
of the tokens is 1 / c and the fullest rank of a step is linear. Decode: u_ser, whether r computes e in step s; for
whole x and a whole bound these are a flow, so they need not be whole themselves.

References: scipy.optimize.milp; HiGHS, Huangfu and Hall, Math. Prog. Comp. 10 (2018).
"""

# Shapes: S steps, R ranks, E experts.

from __future__ import annotations

from typing import Any, Literal

import numpy as np


class _Model:
    """A mixed-integer program in the making: variables with a cost, and rows of sums."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.whole: list[int] = []
        self.upper: list[float] = []
        self.rows: list[tuple[list[tuple[int, float]], float, float]] = []

    def add(self, shape: tuple[int, ...], cost: float = 0.0, whole: bool = True, upper: float = 1.0) -> np.ndarray:
        """Numbers of fresh variables from 0 to `upper`."""
        start, count = len(self.cost), int(np.prod(shape))
        self.cost += [cost] * count
        self.whole += [int(whole)] * count
        self.upper += [upper] * count
        return np.arange(start, start + count).reshape(shape)

    def sum(self, terms: list[tuple[int, float]], least: float = -np.inf, most: float = np.inf) -> None:
        """A row: least <= sum of factor x variable <= most."""
        self.rows.append((terms, least, most))

    def solve(self, seconds: float) -> Any:
        """scipy's result.

        Raises:
            ModuleNotFoundError: scipy is not installed.
        """
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
            from scipy.sparse import csr_array
        except ImportError as error:
            raise ModuleNotFoundError("the exact planner needs scipy: pip install 'coterie[plan]'") from error
        entries = [(i, v, c) for i, (terms, _, _) in enumerate(self.rows) for v, c in terms]
        i, v, c = zip(*entries, strict=True)
        matrix = csr_array((c, (i, v)), shape=(len(self.rows), len(self.cost)))
        rows = LinearConstraint(matrix, [r[1] for r in self.rows], [r[2] for r in self.rows])  # type: ignore[arg-type]
        return milp(
            np.array(self.cost),
            integrality=np.array(self.whole),
            bounds=Bounds(np.zeros(len(self.cost)), np.array(self.upper)),  # type: ignore[arg-type]
            constraints=rows,
            options={"time_limit": seconds, "mip_rel_gap": 1e-6},
        )


def exact(
    loads_SE: np.ndarray, ranks: int, slots: int, aim: Literal["prefill", "decode"], seconds: float = 60.0
) -> tuple[np.ndarray, float] | None:
    """Which rank holds which expert (R, E), and what that costs: the sum over steps of the fullest rank's tokens, or
    of the most experts that one computes. None: not proven within the time.

    Args:
        slots: of a rank.
    """
    S, E = loads_SE.shape
    model = _Model()
    x_ER = model.add((E, ranks))
    for r in range(ranks):
        model.sum([(v, 1.0) for v in x_ER[:, r]], most=slots)
    for e in range(E):
        model.sum([(v, 1.0) for v in x_ER[e]], least=1)
    model.sum([(x_ER[0, 0], 1.0)], least=1)  # ranks are alike, so expert 0 may be on the first
    top = float(loads_SE.sum(1).max()) if aim == "prefill" else float(E)
    most_S = model.add((S,), cost=1.0, whole=aim == "decode", upper=top)
    (_prefill if aim == "prefill" else _decode)(model, loads_SE, x_ER, most_S)
    result = model.solve(seconds)
    if result.status != 0:
        return None
    return result.x[x_ER].round().astype(bool).T, float(result.fun)


def _prefill(model: _Model, loads_SE: np.ndarray, x_ER: np.ndarray, most_S: np.ndarray) -> None:
    E, R = x_ER.shape
    z_EC, w_ERC = model.add((E, R)), model.add((E, R, R))  # e has c + 1 copies; and r holds one
    for e in range(E):
        model.sum([(v, 1.0) for v in z_EC[e]], 1, 1)
        for c in range(R):
            model.sum([(v, 1.0) for v in w_ERC[e, :, c]] + [(z_EC[e, c], -(c + 1.0))], 0, 0)
        for r in range(R):
            model.sum([(v, 1.0) for v in w_ERC[e, r]] + [(x_ER[e, r], -1.0)], 0, 0)
    for s, loads_E in enumerate(loads_SE):
        for r in range(R):
            terms = [(w_ERC[e, r, c], float(loads_E[e]) / (c + 1)) for e in range(E) for c in range(R)]
            model.sum([*terms, (most_S[s], -1.0)], most=0)


def _decode(model: _Model, loads_SE: np.ndarray, x_ER: np.ndarray, most_S: np.ndarray) -> None:
    E, R = x_ER.shape
    for s, loads_E in enumerate(loads_SE):
        u_ER = model.add((E, R), whole=False)
        active = np.flatnonzero(loads_E)
        for e in active:
            model.sum([(v, 1.0) for v in u_ER[e]], 1, 1)
            for r in range(R):
                model.sum([(u_ER[e, r], 1.0), (x_ER[e, r], -1.0)], most=0)
        for r in range(R):
            model.sum([*((u_ER[e, r], 1.0) for e in active), (most_S[s], -1.0)], most=0)
