"""Published figures of the data sets, printed below ours on request."""

from __future__ import annotations

#: where the figures come from, and how they compare with ours
SOURCE = (
    "test NLL in nats of Xu, Cheng, Xie, arXiv:2212.14424, tables of tabular data, at its budgets "
    "on a GPU. They are not of the same budget, split or machine as ours."
)
#: data set → model and NLL of each row
PUBLISHED: dict[str, tuple[tuple[str, str], ...]] = {
    "power": (
        ("JKO-iFlow", "-0.12"),
        ("JKO-iFlow, reparameterized", "-0.40"),
        ("FFJORD or OT-Flow, the better", "0.32"),
        ("FFJORD or OT-Flow, the other", "0.63"),
    ),
    "bsds300": (
        ("JKO-iFlow", "-153.82"),
        ("JKO-iFlow, reparameterized", "-157.75"),
        ("FFJORD or OT-Flow, the better", "-104.62"),
        ("FFJORD or OT-Flow, the other", "-37.80"),
    ),
}
