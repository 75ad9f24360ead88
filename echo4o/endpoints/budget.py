"""The budget of a folder: what its calls have cost over all runs, and whether the next call still fits."""

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from echo4o.common.json_lines import JsonLines
from echo4o.endpoints.endpoint import ModelAnswer
from echo4o.endpoints.limits import ConcurrencyLimit

# USD per million tokens (input, output), as listed when the models were released (April 2025).
KNOWN_PRICES = {"gpt-4.1-2025-04-14": (2.0, 8.0), "gpt-4.1-mini-2025-04-14": (0.4, 1.6)}
_ROUNDING = 1e-9  # USD; a sum of prices may exceed the budget by so much


class BudgetReached(ValueError):
    """The next call could exceed the budget."""


class Ledger:
    """The calls that a folder has paid for, one line each, over all runs into it.

        with ledger:
            account = ledger.account("judge", "openai:MODEL", limit, usd_of=None, expected_usd=0.01)

    Args:
        path: the file of JSON lines; the with block opens it for appending.
        budget: USD that the folder may cost in all; None: no limit.
        token_price: USD per million (input, output) tokens of the lines without a price of their own.
    """

    def __init__(self, path: Path, budget: float | None = None, token_price: tuple[float, float] | None = None):
        self.path, self.budget, self.token_price = path, budget, token_price
        self.calls_by_role: Counter[str] = Counter()
        self.input_tokens = self.output_tokens = 0
        self.accounts: list[Account] = []
        self._priced_usd = 0.0
        self._unpriced_calls = self._unpriced_input = self._unpriced_output = 0
        self._known: set[str] = set()
        self._append: Callable[[dict], None] | None = None
        self._cannot_write = False
        for line in JsonLines(path):
            self._count(line)

    def __enter__(self) -> "Ledger":
        self._closing = ExitStack()
        self._append = self._closing.enter_context(JsonLines(self.path).appending())
        return self

    def __exit__(self, *_) -> None:
        self._append = None
        try:
            self._closing.close()
        except OSError as error:  # closing writes what a full disk did not take before
            self._warn(error)

    def _count(self, line: dict) -> None:
        self._known.add(line["key"])
        self.calls_by_role[line.get("role", "")] += 1
        self.input_tokens += line["input_tokens"]
        self.output_tokens += line["output_tokens"]
        if "usd" in line:
            self._priced_usd += line["usd"]
        else:
            self._unpriced_calls += 1
            self._unpriced_input += line["input_tokens"]
            self._unpriced_output += line["output_tokens"]

    def add(self, line: dict) -> None:
        """Count a call and write its line. A call that cannot be written is counted in this run."""
        if self._append is None:
            raise RuntimeError(f"{self.path}: calls are added within the ledger's with block")
        self._count(line)
        try:
            self._append(line)
        except OSError as error:
            self._warn(error)

    def is_counted(self, key: str) -> bool:
        """Whether a call with this key was counted, by this run or an earlier one."""
        return key in self._known

    def _warn(self, error: OSError) -> None:
        if not self._cannot_write:
            self._cannot_write = True
            warnings.warn(
                f"{self.path}: costs cannot be written ({error}); this run counts them, later runs do not know of them",
                stacklevel=2,
            )

    @property
    def calls(self) -> int:
        """Number of paid calls, over all runs."""
        return self.calls_by_role.total()

    @property
    def kept(self) -> int:
        """Number of answers that this run took from the cache."""
        return sum(account.kept for account in self.accounts)

    def cost_of_tokens(self, input_tokens: float, output_tokens: float) -> float | None:
        """USD, or None where no token price is known."""
        if self.token_price is None:
            return None
        return (input_tokens * self.token_price[0] + output_tokens * self.token_price[1]) / 1e6

    @property
    def spent(self) -> float | None:
        """USD over all runs; None where the price of a call is unknown."""
        if not self._unpriced_calls:
            return self._priced_usd
        unpriced = self.cost_of_tokens(self._unpriced_input, self._unpriced_output)
        return None if unpriced is None else self._priced_usd + unpriced

    def account(
        self,
        role: str,
        model: str,
        limit: ConcurrencyLimit,
        usd_of: Callable[[ModelAnswer], float] | None = None,
        expected_usd: float = 0.0,
    ) -> "Account":
        """Open the account of one model.

        Args:
            limit: tells how many of its calls are open.
            usd_of: USD of an answer, written with each call; None: calls are priced by `token_price`.
            expected_usd: USD of a call, until one has cost more.
        """
        self.accounts.append(Account(self, role, model, limit, usd_of, expected_usd))
        return self.accounts[-1]

    def require_room(self, account: "Account") -> None:
        """Raise [`BudgetReached`] if the open calls, at the cost of the dearest so far, could exceed the budget.

        The next call of `account` counts as open already.
        """
        if self.budget is None:
            return
        expected = sum(other.limit.open * other.dearest_usd for other in self.accounts)
        if (self.spent or 0.0) + expected > self.budget + _ROUNDING:
            of_role = f" ({account.role})" if account.role else ""
            raise BudgetReached(
                f"the budget of {self.budget:g} USD is reached: {self.spent or 0.0:.4f} are spent, and the next call"
                f"{of_role} costs up to {account.dearest_usd:.4f}; all answers are kept, run again with a higher "
                "--budget to continue"
            )


@dataclass
class Account:
    """The calls of one model within a [`Ledger`]."""

    ledger: Ledger
    role: str
    model: str
    limit: ConcurrencyLimit
    usd_of: Callable[[ModelAnswer], float] | None
    dearest_usd: float  # of one call, so far
    kept: int = 0  # answers from the cache

    def add(self, key: str, answer: ModelAnswer) -> None:
        """Count a paid answer, unless its key is known: so a kept answer is counted if a killed run did not do it."""
        if not self.ledger.is_counted(key):
            self.add_paid(key, answer)

    def add_paid(self, key: str, answer: ModelAnswer) -> None:
        """Count an answer that was just paid for. One that could not be used is paid for again with the same key."""
        tokens = {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}
        if self.usd_of is None:
            line, usd = {"key": key, **tokens}, self.ledger.cost_of_tokens(*tokens.values())
        else:
            usd = self.usd_of(answer)
            line = {"key": key, "role": self.role, "model": self.model, **tokens, "usd": usd}
        self.ledger.add(line)
        self.dearest_usd = max(self.dearest_usd, usd or 0.0)

    def require_room(self) -> None:
        """Raise [`BudgetReached`] if the next call could exceed the budget."""
        self.ledger.require_room(self)
