"""One latent of one SAE, from a pass over the store."""

from pathlib import Path

from tcsae.evaluate.candidates import EvalRequest, candidate, evaluable, load
from tcsae.evaluate.report.features.feature_data import feature_data
from tcsae.evaluate.report.features.feature_pass import Excerpt, collect_features
from tcsae.evaluate.report.features.lens import Lenses
from tcsae.evaluate.report.features.shown_feature import FeatureRequest, ShownFeature, check_latent
from tcsae.shared.base.console import progress, say
from tcsae.shared.base.errors import RunError
from tcsae.shared.base.signals import stop_on_signals
from tcsae.shared.lm.token_text import TokenTexts
from tcsae.shared.sae.folder import CONFIG
from tcsae.shared.store.reader import Store


def computed_feature(store: Store, runs_path: Path, request: FeatureRequest) -> ShownFeature:
    """Run the SAE over the split. Raises RunError if there is no such run or latent, or several runs and no name."""
    folders = evaluable(runs_path, [request.name] if request.name else [])
    if len(folders) > 1:
        raise RunError(f"{runs_path} has {len(folders)} runs. Name one: --run {folders[0].name}")
    run = candidate(store, folders[0], EvalRequest())
    sae = load(run).sae
    check_latent(folders[0].name, request.latent, sae.config.d_sae)
    split = store.split(request.split)
    part = Excerpt(split, run.options.hook, run.options.rules, request.max_tokens)
    with stop_on_signals() as stop, progress(f"feature {request.latent}", total=part.n_tokens) as advance:

        def after_batch(n_tokens: int) -> None:
            advance(n_tokens)
            stop.check("nothing is shown yet")

        (features,) = collect_features(part, [sae], after_batch)
    for difference in run.differences:
        say(f"{run.name}: {CONFIG} says {difference}.")
    lenses, latents = Lenses(store, part), [request.latent]
    tail = lenses.tail(run.options.hook)
    peak = features.contexts.maximum()[latents, None, None]
    by_position = lenses.of(run.options.hook, sae.window_rows[latents] * peak)
    data = feature_data(features, sae, by_position, part.tokens, latents if features.alive[request.latent] else [])
    texts = TokenTexts(store)
    return ShownFeature(
        folders[0].name,
        request.latent,
        split.name,
        features.n_tokens,
        {name: values[0] for name, values in data.listing["columns"].items()} if data.latents else {},
        data.listing["fires"][0] if data.latents else [],
        next((chunk[request.latent] for chunk in data.chunks.values()), None),
        {
            number: [
                int(split.documents[number]),
                int(split.starts[number]),
                split.tokens[number, : split.lengths[number]].tolist(),
            ]
            for number in data.sequences
        },
        texts.__getitem__,
        tail if isinstance(tail, str) else None,
    )
