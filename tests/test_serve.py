"""Promise: `tcsae serve` answers this machine alone, below a secret path; reads every token's features as the SAE does,
changes one latent as asked, follows training, and writes nothing.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
import toy_browser as toy
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from tcsae.evaluate.report.pages.page_files import choose_runs
from tcsae.harvest.language_model import stored_model
from tcsae.serve.live_model import Change, LiveModel, changed_by
from tcsae.serve.server import warm_up
from tcsae.shared.base.errors import ConfigError, ModelError
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.reader import open_store

pytestmark = pytest.mark.slow

TEXT = "the model reads each token of one sequence and writes the stream"


@pytest.fixture(scope="module")
def store(evaluated):
    return open_store(evaluated / "a.zarr")


@pytest.fixture(scope="module")
def live(store, evaluated, tiny_lm) -> LiveModel:
    included, _ = choose_runs(store, evaluated / "runs")
    return LiveModel(store, included, stored_model(store.manifest.recipe, str(tiny_lm)))


def run_of(live: LiveModel, start: str) -> str:
    return next(name for name in live.runs if name.startswith(start))


def plain_logits(tiny_lm, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def test_a_text_is_read_as_its_tokens_were_harvested(live, store):
    """A sequence of the store, read live, has the code of its stored activations."""
    name = run_of(live, "topk")
    one = live.runs[name]
    at = int(store.eval.lengths.argmax())
    ids = store.eval.tokens[at, : store.eval.lengths[at]].tolist()
    x = torch.from_numpy(store.eval.read(one.hook, at, at + 1))[0, : len(ids)]
    live.ids = lambda text: ids  # noqa: ARG005 (decoding and encoding again may cut otherwise)
    try:
        result = live.read(name, "")
    finally:
        del live.ids
    with torch.inference_mode():
        code = one.loaded.sae.encode(x)
    for position in range(1, len(ids)):
        expected = {latent: float(code[position, latent]) for latent in code[position].nonzero().squeeze(1).tolist()}
        assert dict(result.latents[position]) == pytest.approx(expected, abs=0.05), "stored as float16"
        assert result.n_active[position] == len(result.latents[position])


def test_a_change_adds_the_latents_change_along_its_row(live):
    sae = live.runs[run_of(live, "topk")].loaded.sae
    x = torch.randn(2, 5, sae.config.d_model, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        code = sae.encode(x)
        latent = int(code.flatten(0, 1).sum(0).argmax())
        for kind, value, by in (
            ("ablate", 0.0, -code[..., latent]),
            ("clamp", 3.0, 3.0 - code[..., latent]),
            ("steer", 3.0, torch.full((2, 5), 3.0)),
        ):
            result = changed_by(sae, x, Change(kind=kind, latent=latent, value=value))
            torch.testing.assert_close(result, by[..., None] * sae.W_dec[latent])


@pytest.mark.parametrize("layer_norm", ["none", "in", "in_out"])
def test_a_change_is_that_of_the_reconstruction_from_the_first_trained_position_on(layer_norm):
    sae = SparseAutoencoder(SaeConfig(d_model=8, d_sae=24, k=3, layer_norm=layer_norm)).requires_grad_(False)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x = 5 * torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(2))
    code = sae.encode(x)
    clamped = code.clone()
    clamped[..., 4] = 3.0
    expected = sae.decode(clamped, x) - sae.decode(code, x)
    expected[:, :2] = 0
    result = changed_by(sae, x, Change(kind="clamp", latent=4, value=3.0), skip_first=2)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_sequences_begin_as_they_would_without_a_change(live):
    name = run_of(live, "topk")
    assert live.runs[name].skip_first == 1
    moved = live.change(name, TEXT, Change(kind="steer", latent=0, value=50.0), 0)
    assert moved.kl[0] < 1e-6 < max(moved.kl)


def test_saes_that_read_neighbours_do_not_stop_the_server(live, monkeypatch, capsys):
    first, *_ = live.runs.values()
    crosscoder = SparseAutoencoder(SaeConfig(d_model=first.loaded.sae.config.d_model, d_sae=8, k=2, window=2))
    unreadable = {"crosscoder": first._replace(loaded=first.loaded._replace(sae=crosscoder))}
    monkeypatch.setattr(live, "runs", unreadable | {first.name: first})
    warm_up(live)
    assert f"2 SAEs at {first.hook}; a first pass took" in capsys.readouterr().err
    monkeypatch.setattr(live, "runs", unreadable)
    warm_up(live)
    assert "None of 1 SAEs can be read token by token" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="crosscoder has codes of several tokens"):
        live.read("crosscoder", TEXT)


def test_nothing_changed_is_no_divergence_and_a_change_is_one(live, tiny_lm):
    name, ids = run_of(live, "topk"), live.ids(TEXT)
    same = live.change(name, TEXT, Change(kind="steer", latent=0, value=0.0), 4)
    assert max(same.kl) < 1e-6
    assert same.clean == same.changed
    grown = list(ids)
    for _ in range(4):
        grown.append(int(plain_logits(tiny_lm, grown)[-1].argmax()))
    assert same.clean == grown[len(ids) :], "the most likely tokens of the model itself"
    moved = live.change(name, TEXT, Change(kind="steer", latent=0, value=50.0), 0)
    assert max(moved.kl) > 0.01
    assert moved.promoted[0][1] > 0 > moved.suppressed[0][1]
    assert moved.clean == moved.changed == []
    again = live.change(name, TEXT, Change(kind="steer", latent=0, value=0.0), 0)
    assert max(again.kl) < 1e-6, "no change is left behind"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda live: live.read("nowhere", TEXT), "Unknown run 'nowhere'"),
        (lambda live: live.read(next(iter(live.runs)), ""), "The text has 0 tokens; give 1 to 64."),
        (lambda live: live.read(next(iter(live.runs)), "token " * 300), "tokens; give 1 to 64."),
        (
            lambda live: live.change(run_of(live, "topk"), TEXT, Change(kind="clmp", latent=0), 0),
            "change 'clmp'",
        ),
        (lambda live: live.change(run_of(live, "topk"), TEXT, Change(kind="clamp", latent=48), 0), "latents 0 to 47"),
    ],
)
def test_a_question_that_cannot_be_is_one_line(live, call, message):
    with pytest.raises(ConfigError, match=".+") as raised:
        call(live)
    assert message.lower() in str(raised.value).lower()


def test_another_model_than_the_stores_is_refused(store, make_lm, tmp_path):
    from transformers import GPTNeoXConfig

    other = make_lm(tmp_path / "other", GPTNeoXConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1,
                                                     num_attention_heads=1, intermediate_size=8))  # fmt: skip
    with pytest.raises(ModelError, match="Give that model: --model"):
        stored_model(store.manifest.recipe, str(other))
    with pytest.raises(ModelError, match="Unknown model 'tiny'.* Where it is now, say with --model"):
        stored_model(store.manifest.recipe)


def test_without_a_report_there_is_nothing_to_serve(evaluated, toy_report, tmp_path):
    done = toy_report.call(evaluated, "serve", "--report", str(tmp_path))
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == f"Error: {tmp_path} is no report. Write one: tcsae report"


# A server of its own process.


@pytest.fixture(scope="module")
def server(evaluated, reported, tiny_lm, tmp_path_factory):
    """(address, process, folder of its runs)."""
    log = (tmp_path_factory.mktemp("serve") / "log").open("w+")
    arguments = ["--store", evaluated / "a.zarr", "--runs", evaluated / "runs", "serve"]
    arguments += ["--report", reported, "--model", tiny_lm]
    process = subprocess.Popen(
        [sys.executable, "-m", "tcsae", *map(str, arguments)], stdout=subprocess.PIPE, stderr=log, text=True
    )
    line = process.stdout.readline()
    assert "Serving " in line, Path(log.name).read_text()
    yield line.rpartition(": ")[2].strip(), process, evaluated / "runs"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    log.close()


def ask(address: str, name: str, question, host: str | None = None) -> tuple[int, dict]:
    body = question if isinstance(question, bytes) else json.dumps(question).encode()
    request = Request(f"{address}answer/{name}", body, {"Host": host} if host else {})
    try:
        with urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else {}


def status(address: str) -> int:
    try:
        with urlopen(address) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def test_only_who_has_the_secret_is_answered_and_nothing_is_written(server, evaluated, reported):
    address, process, _ = server
    root, secret = address.removesuffix("/").rsplit("/", 1)
    assert root.startswith("http://127.0.0.1:") and len(secret) >= 20
    before = {path: path.stat().st_mtime_ns for place in (evaluated, reported) for path in place.rglob("*")}
    assert status(address) == status(f"{address}report/index.html") == 200
    for elsewhere in (f"{root}/", f"{root}/report/index.html", f"{root}/x{secret}/", f"{address}report/..%2f..%2fruns"):
        assert status(elsewhere) == 404, elsewhere
    assert ask(address, "runs", {}, host="evil.example")[0] == 400
    for question in (b"{", b"[]", b'{"run": 3}', b'{"run": "x", "text": "the"}', b'"' + b"x" * 200_000):
        code, result = ask(address, "read", question)
        assert code == 400 and result["error"], question[:20]
    sockets = Path(f"/proc/{process.pid}/net/tcp").read_text()
    port = f"{int(root.rpartition(':')[2]):04X}"
    assert f"0100007F:{port} " in sockets and f"00000000:{port} " not in sockets, "bound to 127.0.0.1"
    after = {path: path.stat().st_mtime_ns for place in (evaluated, reported) for path in place.rglob("*")}
    assert after == before


@pytest.fixture
def page(toy_browser, chromium, server):
    toy_browser.forget(chromium)
    chromium.get(server[0])
    toy.wait(chromium, lambda: toy.one_of(chromium, "#tokens").get_attribute("data-ready"))
    yield chromium
    toy_browser.check_quiet(chromium, frozenset({"http", "data", "file"}))


def test_a_text_is_read_and_a_feature_changed_in_the_browser(page):
    text = toy.one_of(page, "#text")
    text.clear()
    text.send_keys(TEXT)
    Select(toy.one_of(page, "#run")).select_by_visible_text(
        next(one.text for one in toy.all_of(page, "#run option") if one.text.startswith("temporal-matryoshka"))
    )
    toy.wait(page, lambda: toy.one_of(page, "#tokens").get_attribute("textContent") == TEXT)
    toy.one_of(page, "#read").click()  # which reads it anew
    toy.wait(page, lambda: "tokens in" in toy.one_of(page, "#said").text)
    toy.all_of(page, ".token")[3].click()
    assert toy.one_of(page, "#h-of-token").text.startswith("Features of token 3")
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert toy.one_of(page, "#h-of-token").text.startswith("Features of token 4")
    toy.one_of(page, "#of-token .latent").click()
    assert "on" in toy.all_of(page, ".token")[4].get_attribute("class").split(), "where it fires is shaded"
    latent = toy.one_of(page, "#latent").get_attribute("value")
    assert f"latent={latent}" in page.current_url
    for kind in ("ablate", "clamp", "steer"):
        Select(toy.one_of(page, "#kind")).select_by_value(kind)
        toy.one_of(page, "#change-form button").click()
        toy.wait(page, lambda kind=kind: toy.one_of(page, "#outcome").get_attribute("data-ready") == kind)
        assert "nats a token on average" in toy.one_of(page, "#kl").text
    assert len(toy.all_of(page, "#outcome h3")) == 4
    toy.one_of(page, "#of-token a").click()
    toy.wait(page, lambda: toy.all_of(page, "#feature .context"))
    back = next(one for one in toy.all_of(page, ".steps a") if one.text == "on your text")
    back.click()
    toy.wait(page, lambda: toy.all_of(page, ".token.on") or toy.all_of(page, ".token"))
    assert toy.one_of(page, "#latent").get_attribute("value") == latent


def test_the_answer_to_an_older_question_is_dropped(page):
    """The first answer is held back until the second is shown."""
    page.execute_script(
        "const real = window.fetch; let late = 1500; window.fetch = async (...all) => { const wait = late; late = 0; "
        "const answer = await real(...all); await new Promise((go) => setTimeout(go, wait)); return answer; };"
    )
    text = toy.one_of(page, "#text")
    for words in ("one sequence", TEXT):
        text.clear()
        text.send_keys(words)
        toy.one_of(page, "#read").click()
    toy.wait(page, lambda: toy.one_of(page, "#tokens").get_attribute("textContent") == TEXT)
    page.execute_async_script("setTimeout(arguments[0], 2500)")
    assert toy.one_of(page, "#tokens").get_attribute("textContent") == TEXT


def test_training_is_followed_as_it_goes(page, server):
    name = next(path.name for path in server[2].iterdir() if path.name.startswith("topk"))
    file = server[2] / name / "metrics.jsonl"
    toy.wait(page, lambda: name in toy.one_of(page, "#training").text)
    before = file.read_bytes()
    times = file.stat()
    try:
        last = json.loads(before.splitlines()[-1])
        with file.open("ab") as more:
            more.write(json.dumps({**last, "step": 4321}).encode() + b"\n")
        toy.wait(page, lambda: "at step 4,321" in toy.one_of(page, "#training").text)
    finally:
        file.write_bytes(before)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_has_nothing_to_say_of_the_live_page(page, scheme):
    toy.tools.set_scheme(page, scheme)
    try:
        toy.wait(page, lambda: toy.all_of(page, "#of-text .latent"))
        toy.one_of(page, "#of-text .latent").click()
        assert toy.complaints(page) == []
        toy.tools.set_size(page, 390, 844)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        toy.tools.set_scheme(page, None)
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
