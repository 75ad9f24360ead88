"""One budget for several models, each with its own price: what [`Ledger`](calls.py) is for one judge."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from echo4o.common.json_lines import JsonLines
from echo4o.evaluation.calls import BudgetReached, Gate
from echo4o.evaluation.judges.base import Answer


@dataclass
class Purse:
    """What a folder has cost so far, over all runs into it, and how much it may cost."""

    path: Path
    budget: float | None = None
    spent: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)  # by role
    accounts: list["Account"] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)

    def __post_init__(self):
        for line in JsonLines(self.path):
            self._count(line)

    def _count(self, line: dict) -> None:
        self._known.add(line["key"])
        self.spent += line["usd"]
        self.calls[line["role"]] = self.calls.get(line["role"], 0) + 1

    def account(self, role: str, model: str, price: Callable[[Answer], float], guess: float, gate: Gate) -> "Account":
        """What the calls of one model are counted in.

        Args:
            price: USD of an answer.
            guess: USD of a call, until one was seen that cost more.
        """
        opened = Account(self, role, model, price, guess, gate)
        self.accounts.append(opened)
        return opened

    def require(self, account: "Account") -> None:
        """BudgetReached if one more call of the account, beside all that are open, could exceed the budget."""
        if self.budget is None:
            return
        expected = sum(other.gate.open * other.most for other in self.accounts)  # the call itself is open, too
        if self.spent + expected > self.budget + 1e-9:
            raise BudgetReached(
                f"the budget of {self.budget:g} USD is reached: {self.spent:.4f} are spent and the next call "
                f"({account.role}) costs up to {account.most:.4f}; all that was paid for is kept, run again with a "
                "higher --budget to go on"
            )


@dataclass
class Account:
    """Stands where a caller expects its ledger."""

    purse: Purse
    role: str
    model: str
    price: Callable[[Answer], float]
    most: float  # USD of the dearest call so far
    gate: Gate
    kept: int = 0

    def add(self, key: str, answer: Answer, append: Callable[[dict], None]) -> None:
        if key in self.purse._known:
            return
        usd = self.price(answer)
        tokens = {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}
        line = {"key": key, "role": self.role, "model": self.model, **tokens, "usd": usd}
        append(line)
        self.purse._count(line)
        self.most = max(self.most, usd)

    def require_next(self, open_calls: int, guess: float) -> None:
        self.purse.require(self)
