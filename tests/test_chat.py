"""Promise: conversations become sequences by a chat template, none with two of them, and say whose token each is."""

import dataclasses
import json
import random

import numpy as np
import pytest
from click.testing import CliRunner

from tcsae.harvest.chat import ChatChoice, chat_template
from tcsae.harvest.language_model import find_model
from tcsae.harvest.run import harvest
from tcsae.shared.base.errors import ConfigError, DataError, ModelError
from tcsae.shared.commands.group import cli
from tcsae.shared.store.reader import open_store
from tcsae.shared.store.verify import find_faults

MARKS = """{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} end
{% endgeneration %}{% else %}{{ m.content | trim }}
{% endif %}{% endfor %}"""
PLAIN = "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}\n{% endfor %}"
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + PLAIN
CHATML = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}"
DEFAULT = "{% if messages[0].role != 'system' %}You are no human, ok?\n{% endif %}" + CHATML
FOLDED = """{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.index0 == 1 %}<<SYS>>
{{- messages[0].content }}<</SYS>>{% endif %}
{{ m.content | trim }}
{% elif m.role == 'assistant' %}{{ m.content | trim }}{% endif %}{% endfor %}"""
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}({{ part.text | trim }}){% endfor %}{% endfor %}"
)
PEEKS = CHATML.replace("\n{{", "\n{% if m.content.startswith('!') %}loud:{% endif %}{{")
CUTS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
SHOUTS = CHATML.replace("m.content", "(m.content | upper if m.role == 'user' else m.content)")
WORDS = ["the", "stream", "reads", "each", "token", "of", "one", "window"]


def conversation(rng: random.Random) -> list[dict[str, str]]:
    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))

    turns = [{"role": role, "content": text()} for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")]
    return [{"role": "system", "content": f" {text()} "}, *turns]


@pytest.fixture(scope="module")
def conversations():
    rng = random.Random(3)
    return [conversation(rng) for _ in range(70)]


@pytest.fixture(scope="module")
def data(conversations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    shared = [
        [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]} for m in one]
        for one in conversations
    ]
    for name, rows in (("roles", conversations), ("sharegpt", shared)):
        lines = [json.dumps({"messages": one}) + "\n" for one in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, template in (("marks", MARKS), ("plain", PLAIN), ("strict", STRICT)):
        (folder / f"{name}.jinja").write_text(template)
    return folder


def config(tiny_config, data, template: str, roles: tuple[str, ...], rows: str = "roles"):
    corpus = dataclasses.replace(
        tiny_config.corpus, name=str(data / f"{rows}.jsonl"), field="messages", chat=True, seed=0
    )
    chat = ChatChoice(template=str(data / f"{template}.jinja"), roles=roles)
    return dataclasses.replace(tiny_config, corpus=corpus, chat=chat, n_tokens=2000, hooks=tiny_config.hooks[:1])


def text_by_role(store, split: str) -> dict[int, dict[str, str]]:
    """What each conversation's marked tokens say, by role."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    one, names = store.split(split), store.manifest.recipe.roles
    result: dict[int, dict[str, list[int]]] = {}
    for tokens, roles, length, document in zip(one.tokens, one.roles, one.lengths, one.documents, strict=True):
        for token, role in zip(tokens[:length], roles[:length], strict=True):
            if role:
                result.setdefault(int(document), {}).setdefault(names[role - 1], []).append(int(token))
    return {n: {role: tokenizer.decode(ids) for role, ids in roles.items()} for n, roles in result.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "rows", "spans"),
    [("marks", "roles", ("generation", "content")), ("plain", "sharegpt", ("content", "content"))],
)
def test_marked_tokens_are_those_of_the_role(tiny_config, data, conversations, tmp_path, template, rows, spans):
    store = harvest(str(tmp_path / "a.zarr"), config(tiny_config, data, template, ("assistant", "user"), rows))
    assert store.manifest.version == 3
    assert store.manifest.recipe.chat.spans == spans
    assert not list(find_faults(store.location, [].append))
    end = " end\n" if spans[0] == "generation" else ""
    seen = 0
    for split in ("train", "eval"):
        full = text_by_role(store, split)
        for number in list(full)[:-1]:  # the last may be cut by the budget
            for role, close in (("assistant", end), ("user", "")):
                said = [m["content"] + close for m in conversations[number] if m["role"] == role]
                # A token may hold the space before a message's text: spaces are nobody's.
                assert full[number][role].replace(" ", "") == "".join(said).replace(" ", "")
                seen += 1
        counts = store.manifest.counts[split]
        assert counts["tokens_of_user"] == (store.split(split).roles == 2).sum()
    assert seen > 40
    same = [np.array_equal(store.train.documents, np.sort(store.train.documents))]
    assert all(same)


def turns(*contents) -> list[dict]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def with_brackets(reader, tokenizer, messages) -> str:
    """The text of a conversation, with user's tokens in [] and the assistant's in {}."""
    ids, roles = reader.read(messages)
    cuts = np.flatnonzero(np.diff(roles)) + 1
    pieces = zip(np.split(ids, cuts), np.split(roles, cuts), strict=True)
    return "".join("|[{"[role] + tokenizer.decode(some) + "|]}"[role] for some, (role, *_) in pieces).replace("|", "")


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, turns("user", "assistant", "a"), "<user>\n[user]\n<assistant>\n{assistant}\n<user>\n[a]\n"),
        (CHATML, turns("a", "<user>\nno"), "<user>\n[a]\n<assistant>\n{<user>\nno}\n"),
        (CHATML, turns("no", "no"), "<user>\n[no]\n<assistant>\n{no}\n"),
        (CHATML, turns("", "s", "\n"), "<user>\n\n<assistant>\n{s}\n<user>\n\n\n"),
        (DEFAULT, turns("no", "ok"), "You are no human, ok?\n<user>\n[no]\n<assistant>\n{ok}\n"),
        (
            FOLDED,
            [{"role": "system", "content": "S"}, *turns(" SYS ", "s")],
            "[INST]<<SYS>>S<</SYS>>[SYS]\n{s}",
        ),
        (PARTS, turns([{"type": "text", "text": one} for one in ("user", "\n", "r")]), "<user>([user])()([r])"),
        (PEEKS, turns("!loud", "loud"), "<user>\nloud:[!loud]\n<assistant>\n{loud}\n"),
        (CUTS, turns("user", "<think>s</think>s", "t"), "<user>\n[user]\n<assistant>\ns\n<user>\n[t]\n"),
        (SHOUTS, turns("user", "s"), "<user>\nUSER\n<assistant>\n{s}\n"),
    ],
)
def test_a_message_is_not_taken_for_the_templates_own_words(tiny_lm, tmp_path, template, messages, expected):
    (tmp_path / "a.jinja").write_text(template)
    model = find_model(str(tiny_lm))
    reader = chat_template(ChatChoice(template=str(tmp_path / "a.jinja"), roles=("user", "assistant")), model)
    assert with_brackets(reader, model.tokenizer(), messages) == expected
    assert reader.n_unmarked == (template in (CUTS, SHOUTS)), "what is not in the text as it stands is counted"


@pytest.mark.slow
def test_without_roles_nothing_is_marked_and_nulls_are_shuffled_with_their_roles(tiny_config, data, tmp_path):
    plain = harvest(str(tmp_path / "a.zarr"), config(tiny_config, data, "plain", ()))
    assert "roles" not in dict(plain.objects.listed())
    assert not any(key.startswith("train/roles") for key in plain.manifest.objects())
    from tcsae.shared.store.format import ControlRecipe

    asked = config(tiny_config, data, "plain", ("user",))
    straight = harvest(str(tmp_path / "b.zarr"), asked)
    null = harvest(str(tmp_path / "c.zarr"), dataclasses.replace(asked, control=ControlRecipe(kind="permuted", seed=1)))
    assert plain.train.tokens.tolist() == straight.train.tokens.tolist()
    assert (null.train.roles != straight.train.roles).any()
    of = [{(t, r) for t, r in zip(s.train.tokens.flat, s.train.roles.flat, strict=True)} for s in (straight, null)]
    assert len(of[0] ^ of[1]) < 0.2 * len(of[0]), "each token keeps its role"


@pytest.mark.slow
def test_extended_it_is_what_one_harvest_makes(tiny_config, data, tmp_path):
    small, large = (
        dataclasses.replace(config(tiny_config, data, "plain", ("user",)), n_tokens=n) for n in (1500, 2500)
    )
    harvest(str(tmp_path / "a.zarr"), small)
    extended = harvest(str(tmp_path / "a.zarr"), large)
    assert extended.content == harvest(str(tmp_path / "b.zarr"), large).content


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"template": "nowhere"},
            ConfigError,
            r"nowhere.jinja cannot be read \(No such file.*Give a file with a Jinja",
        ),
        ({"template": "strict"}, DataError, r"refuses document 0 \(the user begins\). Leave that conversation out"),
        ({"roles": ("asistant",)}, DataError, "Unknown role 'asistant'. Did you mean 'assistant'"),
        ({"roles": ("user", "user")}, ConfigError, "--roles user,user: give each role once"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(tiny_config, data, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        harvest(
            str(tmp_path / "a.zarr"), config(tiny_config, data, **{"template": "plain", "roles": ("user",), **change})
        )
    assert not (tmp_path / "a.zarr").exists()


def test_a_tokenizer_without_a_template_names_the_option(tiny_config, data, tmp_path):
    asked = dataclasses.replace(config(tiny_config, data, "plain", ()), chat=ChatChoice())
    with pytest.raises(ModelError, match="has no chat template. Give a file with one: --chat-template FILE"):
        harvest(str(tmp_path / "a.zarr"), asked)


@pytest.mark.parametrize(
    ("row", "found"),
    [("text", "str, not a list of messages"), ([1], "a list of int"), ([{"text": "a"}], "a message with text in it")],
)
def test_a_column_without_messages_is_named(tiny_config, data, tmp_path, row, found):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": row}) + "\n")
    asked = config(tiny_config, data, "plain", ())
    asked = dataclasses.replace(asked, corpus=dataclasses.replace(asked.corpus, name=str(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match=f"document 0 has {found}.*--messages-field NAME"):
        harvest(str(tmp_path / "a.zarr"), asked)


@pytest.mark.slow
def test_from_the_command_line_to_a_run_on_one_role(tiny_lm, data, tmp_path):
    def run(*arguments: str):
        done = CliRunner().invoke(cli, ["--store", f"{tmp_path}/a.zarr", "--runs", f"{tmp_path}/runs", *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    chat = ("--chat-template", f"{data}/marks.jinja", "--roles", "assistant,user")
    size = ("--tokens", "1500", "--sequence-length", "32", "--eval-every", "4", "--batch-size", "4")
    text = ("--model", str(tiny_lm), "--dataset", f"{data}/roles.jsonl", "--hook", "blocks.2.hook_resid_post")
    assert "tokens_of_assistant" in run("harvest", *text, *chat, *size)
    small = ("--steps", "3", "--set", "sae.d_sae=32", "--set", "sae.k=4")
    run("train", "--preset", "topk", "--positions", "assistant", *small, "eval")
    evaluation = json.loads(next(tmp_path.glob("runs/*/eval.json")).read_text())
    store = open_store(tmp_path / "a.zarr")
    assert evaluation["n_tokens"] == (store.eval.roles[:, 1:] == 1).sum()
    refused = CliRunner().invoke(cli, ["harvest", "--roles", "user"])
    assert refused.exit_code == 1
    assert refused.output.strip() == "Error: --roles user needs --chat-template: without one there are no roles."
