"""A greedy soup of the checkpoints of a run: what it takes is made, evaluated and removed."""

from collections.abc import Callable, Sequence

from ckpt_ema.errors import some
from ckpt_ema.output.candidates import Candidates
from ckpt_ema.output.selected import SOUP, SoupStep
from ckpt_ema.output.workspace import remove
from ckpt_ema.planning.decide import Choose
from ckpt_ema.planning.plan import Plan
from ckpt_ema.run import RunKeywords
from ckpt_ema.selection.competing import singles, soup
from ckpt_ema.selection.evaluation import Evaluation, Judge
from ckpt_ema.selection.greedy import Members, greedy_soup
from ckpt_ema.selection.staging import Entrant, make_averages, trials

PlanOf = Callable[[Choose], Plan]


class Soups:
    """Evaluates checkpoints and soups of them, as few at a time as the disk must hold."""

    def __init__(
        self, plan_of: PlanOf, alone: Plan, stage: Candidates, judge: Judge, how: RunKeywords
    ) -> None:
        """Take the plan of each checkpoint `alone`; `plan_of` makes others of the same run."""
        self._plan_of, self._alone = plan_of, alone
        self._stage, self._judge, self._how = stage, judge, how
        self._folder = stage.path / "greedy"
        self._names = [one.name for one in alone.checkpoints]

    def find(self, evaluation: Evaluation) -> tuple[Entrant | None, list[SoupStep]]:
        """Return the soup, which is not made yet, and its steps.

        There is none if no checkpoint could be evaluated. As many checkpoints are on the disk at a
        time as are evaluated at a time.
        """
        at_once = evaluation.jobs
        digests = [one.output.fingerprint for one in self._alone.averages]
        known = self._judge.known
        new = [number for number, digest in enumerate(digests) if known(digest) is None]
        for first in range(0, len(new), at_once):
            batch = new[first : first + at_once]
            self._evaluate(self._plan_of(singles(batch)), [self._names[one] for one in batch])
        values = [self._judge.value(known(digest)) for digest in digests]
        members, tried = greedy_soup(values, self._value, is_minimized=evaluation.is_minimized)
        steps = [
            SoupStep(self._names[one.number], values[one.number], one.value, one.is_kept)
            for one in tried
        ]
        if not members:
            return None, steps
        plan = self._plan_of(soup(SOUP, members))
        return Entrant(plan, plan.averages[0], self._stage.folder / SOUP), steps

    def make(self, entrant: Entrant) -> None:
        """Make the soup beside the other candidates."""
        [made] = make_averages(entrant.plan, self._folder, self._stage, self._how)
        self._stage.move(made.folder, entrant.folder)

    def _value(self, members: Members) -> float | None:
        plan = self._plan_of(soup(SOUP, members))
        digest = plan.averages[0].output.fingerprint
        if self._judge.known(digest) is None:
            self._evaluate(plan, [f"soup of {some((self._names[one] for one in members), 3)}"])
        return self._judge.value(self._judge.known(digest))

    def _evaluate(self, plan: Plan, names: Sequence[str]) -> None:
        made = make_averages(plan, self._folder, self._stage, self._how)
        self._judge.evaluate(trials(made, names))
        remove(self._folder)
