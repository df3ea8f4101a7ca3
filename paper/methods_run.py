"""`tcsae methods` and `tcsae real-lm`: choose each method's learning rate, train and evaluate all, write the page."""

from collections.abc import Sequence
from pathlib import Path

from tcsae.paper.arms import TEXT, Arm
from tcsae.paper.methods import METHODS, Method, table_arm, tuning_arm
from tcsae.paper.pages.methods_page import METHODS_PAGE, Chosen, MethodsPage, write_methods
from tcsae.paper.pages.page import PageContext
from tcsae.paper.results import Place, Results, Source
from tcsae.paper.run import Size, evaluate_arms, load_arm, make_store, read_times, timed, train_arms
from tcsae.paper.training_costs import training_costs
from tcsae.shared.base.console import say
from tcsae.shared.base.distributed import ranks
from tcsae.shared.base.errors import RunError
from tcsae.shared.store.reader import Store
from tcsae.train.presets import preset


def compare_methods(
    place: Place,
    out: Path,
    asked: Source,
    size: Size,
    methods: Sequence[Method] = METHODS,
    page: MethodsPage = METHODS_PAGE,
) -> None:
    """From the store to the page; what is done is not done again. In parallel processes runs are dealt out."""
    store = make_store(place, TEXT, asked, page.name)
    for hook in store.hooks:
        store.tail_path(hook)  # raises NoTailError: delta CE needs one
    stores, results = {TEXT: store}, Results({}, {TEXT: place.runs(TEXT)})
    rates = {method.name: _tried(method, store) for method in methods}
    tuned = [method for method in methods if len(method.rates) != 1]
    tuning = [tuning_arm(method, rate) for method in tuned for rate in rates[method.name]]
    _finish(place, stores, tuning, size, results, "tuning")
    chosen = {method.name: Chosen(rates[method.name][0], {}) for method in methods}
    chosen |= {method.name: _choose(method, rates[method.name], results) for method in tuned}
    arms = [table_arm(method, chosen[method.name].rate) for method in methods]
    arms += [
        table_arm(method, chosen[method.name].rate, shuffled=True) for method in methods if method.shuffled is not None
    ]
    _finish(place, stores, arms, size, results, "table")
    # The other processes are done: steps are timed alone.
    if ranks().rank == 0:
        trained = {method.name: arm for method, arm in zip(methods, arms, strict=False) if not method.smooth}
        costs = training_costs(place, store, trained, size)
        made = PageContext(f"tcsae {page.name}{size.name}{asked.given}", bool(size.name), stores, read_times(place))
        say(f"The page: {write_methods(out, results, chosen, made, costs, methods, page)}")


def _tried(method: Method, store: Store) -> list[float]:
    """The learning rates that are tried; the preset's own where no step is taken."""
    own = preset(method.preset, store.d_model(store.hook())).optimizer.lr
    return [float(f"{own * multiple:.4g}") for multiple in method.rates or (1.0,)]


def _finish(
    place: Place, stores: dict[str, Store], arms: Sequence[Arm], size: Size, results: Results, key: str
) -> None:
    """Train and evaluate arms, and read what came out."""
    arms = list(dict.fromkeys(arms))
    with timed(place, key, "train"):
        train_arms(place, stores, arms, size)
    with timed(place, key, "eval"):
        evaluate_arms(place, stores, arms, size)
    if missing := [arm.label for arm in arms if not load_arm(place, arm, size, stores, results)]:
        raise RunError(f"{missing[0]} has no evaluation in {place.work}. Start the same command again.")


def _choose(method: Method, rates: Sequence[float], results: Results) -> Chosen:
    """The rate of the highest explained variance on the choose half; of equal ones the first."""
    tried = {rate: results.evaluations[tuning_arm(method, rate)][0]["metrics"]["explained_variance"] for rate in rates}
    return Chosen(max(tried, key=lambda rate: tried[rate]), tried)
