"""Promise: in a live model an SAE reads the codes that the store's activations give, and changes what it is asked."""

import json

import pytest
import torch
from rich.console import Console

import tcsae
from tcsae.api.shading import ShadedText
from tcsae.harvest.language_model import find_model, load_bridge, load_plain
from tcsae.shared.sae.layout import SaeMetadata
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder

HOOKS = ("blocks.2.hook_resid_post", "blocks.4.hook_resid_pre")


@pytest.fixture(scope="module")
def store(tiny_lm, tiny_corpus, tmp_path_factory) -> tcsae.Store:
    """float32: a stored activation is the live one."""
    location = tmp_path_factory.mktemp("live") / "a.zarr"
    settings = {"model": tiny_lm, "dataset": tiny_corpus, "sequence_length": 32, "eval_every": 4}
    return tcsae.harvest(location, tokens=1500, hook=HOOKS, codec="float32", **settings)


@pytest.fixture(scope="module", params=["plain", "bridge"])
def model(request, tiny_lm):
    result = find_model(str(tiny_lm))
    return load_plain(result) if request.param == "plain" else load_bridge(result)


def sae_of(hook: str = HOOKS[0], **config) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(**({"d_model": 16, "d_sae": 40, "k": 5} | config)))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    sae.metadata = SaeMetadata(hook=hook, skip_first=1)
    return sae.requires_grad_(False).eval()


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


IDS = torch.tensor([[5, 9, 20, 33, 41, 9, 7], [8, 8, 60, 71, 2, 90, 14]])


@pytest.mark.slow
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_codes_read_live_are_those_of_the_store(store, model, hook):
    sae = sae_of(hook)
    for one in list(store.eval)[:6]:
        before = logits_of(model, torch.from_numpy(one.tokens).long()[None])
        with tcsae.attach(sae, model) as live:
            logits = logits_of(model, torch.from_numpy(one.tokens).long()[None])
        expected = sae.encode(torch.from_numpy(one.activations[hook]))
        torch.testing.assert_close(live.dense()[0], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits, before), "reading changes nothing"


def activation_after(model, sae, prepare, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(activation, changed activation) at the SAE's hook: what a second reader there sees."""
    with tcsae.attach(_mirror(), model, sae.metadata.hook) as reader:
        logits_of(model, IDS)
        x = reader.dense()
        with tcsae.attach(sae, model, **options) as live:
            prepare(live)
            with tcsae.attach(_mirror(), model, sae.metadata.hook) as after:
                logits_of(model, IDS)
                return x, after.dense()


def _mirror() -> SparseAutoencoder:
    """Its code is its input, so that it can be read: relu of both signs would lose half, so biases lift it."""
    sae = SparseAutoencoder(SaeConfig(d_model=16, d_sae=16, activation="relu"))
    sae.load_state_dict({"W_enc": torch.eye(16), "b_enc": torch.full((16,), 1e3)} | _zeros())
    return sae.requires_grad_(False).double().eval()


def _zeros() -> dict[str, torch.Tensor]:
    return {"W_dec": torch.eye(16), "b_dec": torch.zeros(16)}


CHANGES = {
    "ablate": (lambda live: live.ablate(3), {}, lambda sae, x, f: x - f[..., 3:4] * sae.W_dec[3]),
    "clamp": (lambda live: live.clamp(3, 2.5), {}, lambda sae, x, f: x + (2.5 - f[..., 3:4]) * sae.W_dec[3]),
    "steer": (lambda live: live.steer(7, -1.5), {}, lambda sae, x, f: x - 1.5 * sae.W_dec[7]),  # noqa: ARG005
    "splice": (lambda live: None, {"splice": True}, lambda sae, x, f: sae.decode(f, x)),  # noqa: ARG005
    "splice, error": (lambda live: None, {"splice": True, "error": True}, lambda sae, x, f: x),  # noqa: ARG005
    "splice, clamp": (
        lambda live: live.clamp(3, 2.5),
        {"splice": True},
        lambda sae, x, f: sae.decode(f, x) + (2.5 - f[..., 3:4]) * sae.W_dec[3],
    ),
    "reset": (lambda live: (live.clamp(3, 2.5), live.reset()), {}, lambda sae, x, f: x),  # noqa: ARG005
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("skip_first", [0, 2])
@torch.no_grad()
def test_what_goes_on_through_the_model(model, change, skip_first):
    prepare, options, expected = CHANGES[change]
    sae = sae_of()
    lifted, changed = activation_after(model, sae, prepare, skip_first=skip_first, **options)
    x, seen = (lifted - 1e3).float(), (changed - 1e3).float()
    wanted = torch.cat((x[:, :skip_first], expected(sae, x, sae.encode(x))[:, skip_first:]), 1)
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nothing_stays_behind(model):
    before = logits_of(model, IDS)
    with pytest.raises(RuntimeError), tcsae.attach(sae_of(), model, splice=True):
        assert not torch.equal(logits_of(model, IDS), before)
        raise RuntimeError
    assert torch.equal(logits_of(model, IDS), before)


@torch.no_grad()
def test_in_generation_the_cache_counts_as_positions(tiny_lm):
    model = load_plain(find_model(str(tiny_lm)))
    sae = sae_of()

    def generated(**options) -> torch.Tensor:
        with tcsae.attach(sae, model, **options) as live:
            live.steer(7, 30.0)
            kept = model.generate(IDS, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(IDS), **KEEP)
        with tcsae.attach(sae, model, **options) as live:
            live.steer(7, 30.0)
            whole = model.generate(IDS, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(IDS), **DROP)
        assert torch.equal(kept, whole)
        return kept

    KEEP, DROP = {"use_cache": True, "pad_token_id": 0}, {"use_cache": False, "pad_token_id": 0}
    steered = generated(skip_first=8)
    plain = model.generate(IDS, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(IDS), **KEEP)
    assert torch.equal(steered[:, :8], plain[:, :8])


@pytest.mark.parametrize("activation", ["gelu", "relu", "jumprelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_every_kind_and_dtype(tiny_lm, activation, dtype):
    model = load_plain(find_model(str(tiny_lm)))
    sae = sae_of(activation=activation).to(dtype)
    with tcsae.attach(sae, model, splice=True, error=True) as live:
        again = logits_of(model, IDS)
    torch.testing.assert_close(again, logits_of(model, IDS), rtol=1e-3, atol=1e-3)
    assert live.code.values.dtype == dtype


@pytest.mark.parametrize(
    "config, hook, error, message",
    [
        ({}, "blocks.9.hook_resid_post", tcsae.ModelError, "blocks.9.hook_resid_post"),
        ({}, "nothing", tcsae.ModelError, "nothing"),
        ({"d_model": 17}, None, tcsae.ModelError, "is 16 wide; the SAE reads d_model 17"),
    ],
)
def test_a_wrong_place_is_refused(model, config, hook, error, message):
    with pytest.raises(error, match=message), tcsae.attach(sae_of(**config), model, hook):
        logits_of(model, IDS)


def test_wrong_use_is_refused(model):
    sae = sae_of()
    with tcsae.attach(sae, model) as live:
        with pytest.raises(tcsae.ModelError, match="has not fired: run the model inside"):
            _ = live.code
        with pytest.raises(tcsae.ConfigError, match="Latent 40: this SAE has latents 0 to 39"):
            live.ablate(40)
    sae.metadata = SaeMetadata()
    with pytest.raises(tcsae.ConfigError, match="does not say where it belongs"), tcsae.attach(sae, model):
        pass


def test_a_module_by_its_path(tiny_lm):
    model = load_plain(find_model(str(tiny_lm)))
    with tcsae.attach(sae_of(), model, "layers.1.mlp") as live, torch.no_grad():
        logits_of(model, IDS)
    assert live.shape == (2, 7)


def test_a_text_shaded(tiny_lm):
    text = "the model reads one token and writes each window"
    result = tcsae.activations(sae_of(), str(tiny_lm), text)
    assert "".join(result.tokens) == text
    peaks = result.top(3)
    assert len({peak.latent for peak in peaks}) == 3
    for peak in peaks:
        values = result.latent(peak.latent)
        assert peak.value == float(values.max()) == float(values[peak.position])
        assert result.tokens[peak.position] == peak.token and peak.position > 0
    frame = result.to_pandas()
    assert frame["value"].max() == pytest.approx(peaks[0].value) and frame["position"].min() >= 1
    assert f"latent {peaks[0].latent}, peak" in repr(result) and "⟦" in repr(result)
    assert "background:#" in result._repr_html_()
    console = Console(force_terminal=True, width=200, color_system="truecolor")
    with console.capture() as capture:
        console.print(result)
    assert "\x1b[38;2;244;244;240;48;2" in capture.get()
    with pytest.raises(tcsae.ConfigError, match="Latent 99"):
        result.latent(99)
    for prepend_bos in (False, True):
        with pytest.raises(tcsae.DataError, match="no token"):
            tcsae.activations(sae_of(), str(tiny_lm), "", prepend_bos=prepend_bos)


def test_a_missing_bos_is_one_line(tiny_lm):
    tokenizer = find_model(str(tiny_lm)).tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(tcsae.ModelError, match="no BOS token to begin the text with. Give prepend_bos=False"):
        tcsae.activations(sae_of(), str(tiny_lm), "the", tokenizer=tokenizer, prepend_bos=True)


def test_the_same_text_through_a_bridge(tiny_lm):
    bridge = load_bridge(find_model(str(tiny_lm)))
    result = [tcsae.activations(sae_of(), one, "the model reads") for one in (bridge, str(tiny_lm))]
    torch.testing.assert_close(result[0].code.dense(), result[1].code.dense(), rtol=1e-4, atol=1e-4)


def test_hostile_text_stays_text():
    shown = ShadedText(["<script>", "a&b"], [1.0, 0.0], "<b>")
    assert "<script>" not in shown._repr_html_() and "&lt;script&gt;" in shown._repr_html_()
    assert "<b>&lt;b&gt;:</b>" in shown._repr_html_()
    assert str(shown) == "<b>: ⟦<script>⟧a&b"


def test_a_features_contexts(store, tmp_path):
    sae = sae_of()
    sae.metadata = SaeMetadata(hook=HOOKS[0])
    sae.save(tmp_path / "mine")
    assert not json.loads((tmp_path / "mine" / "cfg.json").read_text())["metadata"].get("store")
    activity = torch.cat([sae.encode(torch.from_numpy(one.activations[HOOKS[0]][1:])) for one in store.eval])
    latent = int((activity > 0).sum(0).argmax())
    result = tcsae.feature(store, tmp_path / "mine", latent)
    assert result.maximum == pytest.approx(float(activity[:, latent].max()), rel=1e-3)
    assert result.density == pytest.approx(float((activity[:, latent] > 0).float().mean()))
    first = result.contexts[0]
    texts = {store.tokens_text(i, "eval") for i in range(len(store.eval))}
    assert "".join(first.tokens) in texts and max(first.shares) == pytest.approx(1, rel=1e-3)
    assert f"latent {latent} of mine" in str(result) and "background" in result._repr_html_()
    with pytest.raises(tcsae.ConfigError, match="Latent 40: mine has latents 0 to 39"):
        tcsae.feature(store, tmp_path / "mine", 40)
