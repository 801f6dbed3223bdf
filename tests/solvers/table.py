"""The table of solver tests: one row for each solver and set of options."""

from dataclasses import dataclass, field

from diffdistill.solvers import Solver, make_solver


@dataclass(frozen=True)
class Row:
    """What is stated about a solver.

    Attributes:
        order: measured on a smooth schedule with exact start-up.
        schedule: on which the order holds: any ("log" is used), or only with equal steps in sigma ("uniform").
        evaluations: of one step.
        afs: whether the analytical first step has a meaning.
        deterministic: options that take away randomness and the lower order at the end of a run.
    """

    name: str
    order: int
    options: dict = field(default_factory=dict)
    schedule: str = "log"
    evaluations: int = 1
    afs: bool = True
    deterministic: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(str(value) for value in self.options.values()), self.schedule])

    def solver(self, **more: object) -> Solver:
        return make_solver(self.name, **{**self.options, **more})


ROWS = [
    Row("euler", 1),
    Row("ddim", 1),
    Row("heun", 2, evaluations=2),
    Row("dpm2", 2, evaluations=2),
    Row("dpm2", 2, {"r": 0.7}, evaluations=2),
    Row("dpm3", 3, evaluations=3),
    Row("dpmpp_2s", 2, evaluations=2),
    Row("dpmpp_3s", 3, evaluations=3),
    *(
        Row("dpmpp", order, {"order": order, "prediction": form}, deterministic={"lower_order_final": False})
        for order in (1, 2)
        for form in ("x0", "eps")
    ),
    *(
        Row(
            "dpmpp",
            order,
            {"order": 3, "prediction": form, "third_order": update},
            deterministic={"lower_order_final": False},
        )
        for order, update in ((2, "published"), (3, "exact"))
        for form in ("x0", "eps")
    ),
    *(
        Row(
            "unipc",
            order + 1,
            {"order": order, "variant": variant, "prediction": form},
            deterministic={"lower_order_final": False},
        )
        for order in (1, 2, 3)
        for variant in ("bh1", "bh2")
        for form in ("x0", "eps")
    ),
    *(Row("deis", order, {"order": order, "mode": mode}) for order in (1, 2, 3, 4) for mode in ("tab", "rhoab")),
    *(Row("ipndm", order, {"order": order}, schedule="uniform") for order in (1, 2, 3, 4)),
    *(Row("ipndm", 2, {"order": order}) for order in (2, 3, 4)),
    *(Row("ipndm_v", min(order, 3), {"order": order}) for order in (1, 2, 3, 4)),
    *(Row("ipndm_v", order, {"order": order, "coefficients": "exact"}) for order in (1, 2, 3, 4)),
    Row("edm_sde", 2, evaluations=2, afs=False, deterministic={"churn": 0.0}),
    Row("euler_ancestral", 1, deterministic={"eta": 0.0}),
    *(Row("dpmpp_sde", 2, {"order": order}, afs=False, deterministic={"eta": 0.0}) for order in (2, 3)),
    *(Row("res_multistep", 2, {"prediction": form}) for form in ("x0", "eps")),
    Row("lcm", 0),
    Row("tcd", 1, afs=False, deterministic={"eta": 0.0}),
]
