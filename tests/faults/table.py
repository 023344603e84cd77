"""Tables of counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Table:
    """Counts of faults by kind of file or command."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, kind: str, result: str) -> None:
        self.counts.setdefault(kind, Counter())[result] += 1

    def total(self, result: str) -> int:
        return sum(counter[result] for counter in self.counts.values())

    def lines(self, columns: tuple[str, ...]) -> Iterator[str]:
        yield f"| | {' | '.join(columns)} |"
        yield "|---" * (len(columns) + 1) + "|"
        for kind in sorted(self.counts):
            yield f"| {kind} | {' | '.join(str(self.counts[kind][c]) for c in columns)} |"
        yield f"| all | {' | '.join(str(self.total(c)) for c in columns)} |"
