"""Tokenizer folders and chat templates of pbs-gateway."""

from __future__ import annotations

import json

import pytest
from pbs_client.gateway.chat_template import Chat, ChatTemplate
from pbs_client.gateway.errors import RefusedError
from pbs_client.gateway.tokenizer import Tokenizer
from tiny_tokenizer import CHAT_TEMPLATE, make

PARTS = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "[{{ part['type'] }}:{{ part['text'] }}]{% endfor %}{% endfor %}"
)
ALIASED = (
    "{% for m in messages %}{% set content = m.content %}"
    "{% for part in content %}[{{ part.text }}]{% endfor %}{% endfor %}"
)
PLAIN = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"


def message(*texts: str, role: str = "user", **more):
    return {"role": role, "content": list(texts), **more}


def render(source: str, *messages, **chat) -> str:
    template = ChatTemplate({"default": source}, {"bos_token": "<s>"})
    return template.render(Chat(messages=messages, **chat))


RENDERED = {
    "a text": (PLAIN, [message("hi")], {}, "[user:hi]"),
    "parts as one text": (PLAIN, [message("a", "b")], {}, "[user:a\nb]"),
    "no content": (PLAIN, [message(role="assistant")], {}, "[assistant:]"),
    "parts one by one": (PARTS, [message("a", "b")], {}, "[text:a][text:b]"),
    "parts by another name": (ALIASED, [message("a")], {}, "[a]"),
    "special tokens": ("{{ bos_token }}!", [message("x")], {}, "<s>!"),
    "arguments": ("{{ mode }}", [message("x")], {"arguments": {"mode": "fast"}}, "fast"),
    "tools": (
        "{{ tools | tojson }}",
        [message("x")],
        {"tools": [{"a": "é<"}]},
        '[{"a": "é<"}]',
    ),
    "no tools": ("{{ tools is none }}", [message("x")], {}, "True"),
    "documents": ("{{ documents[0].t }}", [message("x")], {"documents": [{"t": 1}]}, "1"),
    "nothing of HTML": (PLAIN, [message("<&>'")], {}, "[user:<&>']"),
    "a loop that ends early": (
        "{% for m in messages %}{% break %}{% endfor %}x",
        [message("a")],
        {},
        "x",
    ),
    "a block of the assistant's words": (
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        [message("a")],
        {},
        "a",
    ),
    "lines of blocks only": (
        "{% if true %}\nx\n  {% endif %}\ny",
        [message("a")],
        {},
        "x\ny",
    ),
    "an open message": (
        PLAIN + "END",
        [message("a "), message("begin ", role="assistant")],
        {"add_generation_prompt": False, "continue_final_message": True},
        "[user:a ][assistant:begin ",
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_template_renders_messages(name):
    source, messages, chat, expected = RENDERED[name]
    assert render(source, *messages, **chat) == expected


def test_a_template_for_tools_is_used_with_tools():
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render(Chat([message("a")])) == "plain"
    assert template.render(Chat([message("a")], tools=[{}])) == "tools"


REFUSED = {
    "its own words": (
        "{{ raise_exception('only user') }}",
        "refuses the messages: only user",
    ),
    "words of a message": ("{{ raise_exception(messages[0].content) }}", "the messages"),
    "an attribute that is not there": ("{{ a.b.c }}", "the messages"),
    "a division by zero": ("{{ 1 / 0 }}", "the messages"),
    "an index that is not there": ("{{ messages[7]['role'] }}", "the messages"),
    "a wrong type": ("{{ messages + 1 }}", "the messages"),
    "inner attributes of Python": ("{{ ''.__class__.__mro__[1] }}", "the messages"),
    "a change of the request": ("{{ messages.append(1) }}", "the messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_fails_refuses_the_messages_without_quoting_them(name):
    source, said = REFUSED[name]
    with pytest.raises(RefusedError) as caught:
        render(source, message("secret"))
    assert caught.value.status == 400
    assert said in caught.value.message
    assert "secret" not in caught.value.message


def test_a_message_that_the_template_does_not_show_cannot_stay_open():
    chat = {"continue_final_message": True, "add_generation_prompt": False}
    with pytest.raises(RefusedError, match="continue_final_message"):
        render("x", message("begin", role="assistant"), **chat)


WRONG = {
    "no template named default": ({"other": "x"}, "named default"),
    "a template that is none": ({"default": "{% for %}"}, "chat template default"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_template_is_refused_at_start(name):
    sources, said = WRONG[name]
    with pytest.raises(ValueError, match=said):
        ChatTemplate(sources, {})


def test_a_folder_gives_ids_text_and_a_template(tmp_path):
    tokenizer = Tokenizer(make(tmp_path))
    ids = tokenizer.encode("the fox", True)
    assert ids[0] == 0
    assert tokenizer.encode("the fox", False) == ids[1:]
    assert "".join(tokenizer.text_of(i, True) for i in ids) == "the fox"
    assert tokenizer.text_of(0, False) == "<s>"
    assert tokenizer.text_of(999_999, False) == ""
    assert tokenizer.chat.render(Chat([message("a")])).startswith("<s><|im_start|>user")


def test_a_prompt_is_neither_cut_nor_filled(tmp_path):
    folder = make(tmp_path)
    path = folder / "tokenizer.json"
    plain = Tokenizer(folder).encode("the fox jumps", True)
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 1, "pad_type_id": 0, "pad_token": "</s>",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    assert Tokenizer(folder).encode("the fox jumps", True) == plain


def test_a_template_of_a_file_of_its_own_comes_first(tmp_path):
    folder = make(tmp_path / "model", "config")
    chat = Chat([message("a")])
    assert Tokenizer(folder).chat.render(chat) == "config"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer(folder).chat.render(chat) == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert Tokenizer(folder).chat.render(chat) == "jinja"
    given = tmp_path / "mine.jinja"
    given.write_text("given")
    assert Tokenizer(folder, given).chat.render(chat) == "given"


def test_a_folder_without_a_template_has_no_chat(tmp_path):
    assert Tokenizer(make(tmp_path, None)).chat is None


def test_a_list_of_named_templates_is_read(tmp_path):
    names = [{"name": n, "template": n} for n in ("default", "tool_use")]
    chat = Tokenizer(make(tmp_path, names)).chat
    assert chat.render(Chat([message("a")], tools=[{}])) == "tool_use"


FOLDERS = {
    "no tokenizer.json": (lambda f: (f / "tokenizer.json").unlink(), "does not exist"),
    "a tokenizer.json that is none": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json",
    ),
    "a configuration that is no JSON": (
        lambda f: (f / "tokenizer_config.json").write_text("{"),
        "tokenizer_config.json is not JSON",
    ),
    "a configuration that is a list": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"),
        "not a JSON object",
    ),
    "a template that is a number": (
        lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": 5}'),
        "neither a text nor a list",
    ),
    "a template in another encoding": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
        "chat_template.jinja",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wrong_folder_is_refused_at_start_and_the_file_named(name, tmp_path):
    change, said = FOLDERS[name]
    folder = make(tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=said):
        Tokenizer(folder)


CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "what jumps over it?"}],
    "a system's words and three turns": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hi é 😀"},
        {"role": "assistant", "content": " hello "},
        {"role": "user", "content": "<|im_end|> the\n\nfox"},
    ],
}


@pytest.mark.peers
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("generation", [True, False])
def test_ids_are_those_of_transformers(name, generation, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = make(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, messages = Tokenizer(folder), CONVERSATIONS[name]
    text = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation
    )
    chat = Chat(
        [message(m["content"], role=m["role"]) for m in messages],
        add_generation_prompt=generation,
    )
    assert ours.chat.render(chat) == text
    assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
    for entry in messages:
        assert ours.encode(entry["content"], True) == theirs.encode(entry["content"])


@pytest.mark.peers
def test_an_open_message_ends_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(make(tmp_path, CHAT_TEMPLATE))
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": " The answer is "},
    ]
    text = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    template = ChatTemplate({"default": CHAT_TEMPLATE}, {"bos_token": "<s>"})
    chat = Chat(
        [message(m["content"], role=m["role"]) for m in messages],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert template.render(chat) == text
