"""A distributed model as an object of Python: copied, compiled, pickled, configured, and called by PETALS' names."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from transformers import PreTrainedModel

import shoal
from shoal import AutoDistributedModel, AutoDistributedModelForCausalLM
from shoal.client.runtime import Runtime
from shoal.errors import MissingBlocks, UnsupportedOperation, UserError
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net import NetworkConfig
from shoal.net.identity import Identity
from shoal.net.memory import MemoryNetwork

from .harness import FLOAT32, QUICK, Swarm, swarm_of
from .tiny_models import tiny_config, tiny_model

MakeSwarm = Callable[..., Swarm]

TOKENS = torch.arange(3, 19).view(2, 8)
PROMPT = TOKENS[:1]


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_function(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [by_function, in_place])
@pytest.mark.parametrize("tuned", [False, True], ids=["plain", "LoRA"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_computes_the_same(
    compiled: Callable[[Any], Any], tuned: bool, swarm: MakeSwarm, whole: PreTrainedModel
):
    def made(model: Any) -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, config) if tuned else model

    ours, theirs = made(swarm("0:2", "2:4").model()), made(copy.deepcopy(whole))
    quick = compiled(ours)
    for model in (quick, theirs):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    expected = {name: each.grad for name, each in theirs.named_parameters() if each.grad is not None}
    for name, each in ours.named_parameters():
        torch.testing.assert_close(each.grad, expected[name] if each.requires_grad else None)
    generated = [
        model.generate(input_ids=PROMPT, max_new_tokens=5, do_sample=False).tolist() for model in (quick, theirs)
    ]
    assert generated[0] == generated[1]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_leaves_its_head_to_servers(swarm: MakeSwarm, whole: PreTrainedModel):
    net = swarm("0:2")
    net.start("2:4", serve_head=True)
    model = in_place(net.model(config=replace(QUICK, remote_head=True)))
    found = model.generate(PROMPT, max_new_tokens=5, do_sample=False)
    assert found.tolist() == whole.generate(PROMPT, max_new_tokens=5, do_sample=False).tolist()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_copy_of_a_compiled_model_computes_with_its_own_parameters(swarm: MakeSwarm):
    model = in_place(swarm("0:4").model())
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.lm_head.weight)
    assert model(TOKENS).logits.any()
    assert not twin(TOKENS).logits.any()


def test_two_models_of_one_checkpoint_have_a_config_each(folder: Path):
    checkpoint, network = Checkpoint.open(folder), MemoryNetwork()
    first, second = (
        AutoDistributedModel.from_checkpoint(
            checkpoint, network.node(name), Runtime(), options=replace(QUICK, initial_peers=(name,))
        )
        for name in ("/a", "/b")
    )
    assert (first.config.initial_peers, second.config.initial_peers) == (["/a"], ["/b"])
    for model in (first, second):
        model.close()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_compute_the_same(swarm: MakeSwarm):
    blocks = swarm("0:4").model().transformer.h
    hidden = torch.randn(1, 5, 32)
    torch.testing.assert_close(torch.compile(blocks[1:3], backend="eager")(hidden), blocks[1:3](hidden))


# -- copies and pickles -----------------------------------------------------------------------------------------------


def test_closing_a_copy_leaves_the_original_open(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4").model()
    twin = copy.deepcopy(model)
    twin.close()
    expected = whole.generate(PROMPT, max_new_tokens=4).tolist()
    assert model.generate(PROMPT, max_new_tokens=4).tolist() == expected
    for use in (lambda: twin.generate(PROMPT), lambda: twin(PROMPT), twin.inference_session):
        with pytest.raises(UserError, match="this model is closed"):
            use()


def test_closing_the_original_leaves_a_copy_open_and_the_last_one_ends_the_network(folder: Path):
    runtime = Runtime()
    node = MemoryNetwork().node("client")
    model: Any = AutoDistributedModel.from_checkpoint(Checkpoint.open(folder), node, runtime, options=FLOAT32)
    twin = copy.deepcopy(copy.deepcopy(model))
    for _ in range(2):
        model.close()
    with pytest.raises(UserError, match="this model is closed"):
        model.transformer.h[0:1](torch.zeros(1, 1, 32))
    with pytest.raises(MissingBlocks):  # it asks the network
        twin.transformer.h[0:1](torch.zeros(1, 1, 32))
    gc.collect()  # the copy between them is forgotten, and does not count
    twin.close()
    assert not runtime.usable


def test_a_closed_model_is_not_copied(swarm: MakeSwarm):
    model = swarm().model()
    model.close()
    with pytest.raises(UserError, match="this model is closed"):
        copy.deepcopy(model)


def test_a_shallow_copy_is_the_same_model(swarm: MakeSwarm):
    model = swarm("0:4").model()
    other = copy.copy(model)
    assert type(other) is type(model)
    assert other.blocks is model.blocks
    assert other.generate(PROMPT, max_new_tokens=4).tolist() == model.generate(PROMPT, max_new_tokens=4).tolist()


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model, lambda model: model.transformer.h])
@pytest.mark.parametrize("write", [pickle.dumps, lambda each: torch.save(each, io.BytesIO())], ids=["pickle", "torch"])
def test_a_pickle_is_refused_in_one_line(part: Callable[[Any], Any], write: Callable[[Any], Any], swarm: MakeSwarm):
    with pytest.raises(UnsupportedOperation, match="cannot be pickled: its blocks are on servers") as error:
        write(part(swarm().model()))
    assert "save_pretrained" in str(error.value.hint)


# -- keywords ---------------------------------------------------------------------------------------------------------


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> Any:
    """What `from_pretrained` makes of keywords, on a network without servers."""

    class Joined:
        def __init__(self, _: NetworkConfig) -> None:
            self._node = MemoryNetwork().node("client")

        async def __aenter__(self) -> Any:
            return self._node

        async def __aexit__(self, *_: object) -> None:
            await self._node.transport.close()

    monkeypatch.setattr("shoal.client.shared_network.join", Joined)
    return AutoDistributedModelForCausalLM.from_pretrained(folder, **{"initial_peers": "/a", **keywords})


def test_keywords_of_transformers_and_petals_are_taken(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = opened(
        folder,
        monkeypatch,
        torch_dtype=torch.bfloat16,
        device_map="auto",
        low_cpu_mem_usage=True,
        attn_implementation="sdpa",
        trust_remote_code=False,
        show_route=True,
        use_safetensors=True,
        local_files_only=True,
        max_retries=None,
        pad_token_id=7,
    )
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert model.config.pad_token_id == 7
    model.close()


@pytest.mark.parametrize(
    ("keywords", "message", "hint"),
    [
        ({"config": object()}, "no config=", "num_labels=3"),
        ({"trust_remote_code": True}, "no trust_remote_code=True", "never run"),
        ({"load_in_4bit": True}, "no load_in_4bit=True", "--quantization nf4"),
        ({"max_retries": 3}, "no max_retries=3", "MissingBlocks"),
        ({"initial_peer": "/a"}, "knows 'initial_peer'", "did you mean initial_peers?"),
        ({"pad_token": 3}, "knows 'pad_token'", "did you mean pad_token_id?"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keywords_that_cannot_be_honoured_are_refused_with_a_hint(
    keywords: dict[str, Any], message: str, hint: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match=message) as error:
        opened(folder, monkeypatch, **keywords)
    assert hint in str(error.value.hint)


def test_peers_that_may_be_used_may_be_one_string(folder: Path, monkeypatch: pytest.MonkeyPatch):
    one, two = sorted(Identity.temporary().peer for _ in range(2))
    model = opened(folder, monkeypatch, allowed_servers=f"{one}, {two}", blocked_servers=two)
    assert (model.config.allowed_servers, model.config.blocked_servers) == ([one, two], [two])
    model.close()


def test_adaption_prompts_are_refused_in_one_line(swarm: MakeSwarm):
    config = AdaptionPromptConfig(adapter_layers=2, adapter_len=4, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedOperation, match="servers hold the parameters of LlamaAttention") as error:
        get_peft_model(swarm().model(), config)
    assert "LoRA" in str(error.value.hint)


# -- attributes of the config -----------------------------------------------------------------------------------------


def used(model: Any) -> tuple[str, ...]:
    with model.inference_session(max_length=16) as session:
        model.generate(PROMPT, max_new_tokens=1, session=session)
        return session.servers


def test_servers_that_the_config_allows_are_used_from_then_on(swarm: MakeSwarm):
    model = swarm("0:4", "0:4", "0:4").model()
    model.config.allowed_servers = ["s1"]
    assert used(model) == ("s1",)
    model.config.allowed_servers.append("s2")
    model.config.blocked_servers = "s1"
    assert used(model) == ("s2",)
    model.config.allowed_servers = None
    model.config.blocked_servers = ["s1", "s2"]
    assert used(model) == ("s0",)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(input_ids=TOKENS),
        lambda model: model.transformer.h[1:3](torch.ones(1, 3, 32)),
        lambda model: model.generate(PROMPT, max_new_tokens=2),
        lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))(TOKENS),
    ],
    ids=["call", "slice", "generate", "PEFT"],
)
def test_servers_that_the_config_does_not_allow_are_not_used_at_all(use: Callable[[Any], Any], swarm: MakeSwarm):
    model = swarm("0:4").model()
    use(model)
    model.config.allowed_servers = [Identity.temporary().peer]
    with pytest.raises(MissingBlocks, match="that you do not allow"):
        use(model)


def test_the_config_may_name_servers_as_status_shows_them(swarm: MakeSwarm):
    model = swarm("0:4", name="a desk").model()
    model.config.allowed_servers = ["a desk"]
    assert used(model) == ("s0",)
    model.config.allowed_servers = ["a chair"]
    with pytest.raises(UserError, match="no server is called 'a chair'"):
        used(model)


def test_a_copys_config_is_followed_as_well(swarm: MakeSwarm):
    twin = copy.deepcopy(swarm("0:4", "0:4").model())
    for server in ("s1", "s0"):
        twin.config.allowed_servers = [server]
        assert used(twin) == (server,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("active_adapter", "someone/adapter"),
        ("initial_peers", ["/elsewhere"]),
        ("tuning_mode", "ptune"),
        ("pre_seq_len", 16),
        ("max_retries", 3),
        ("request_timeout", 60),
    ],
)
def test_attributes_that_cannot_be_changed_any_more_are_refused(name: str, value: Any, swarm: MakeSwarm):
    model = swarm("0:4").model()
    before = getattr(model.config, name, None)
    setattr(model.config, name, value)
    for use in (lambda: model(TOKENS), lambda: model.generate(PROMPT, max_new_tokens=1), model.inference_session):
        with pytest.raises(UserError, match=rf"model\.config\.{name} cannot be changed") as error:
            use()
        assert error.value.hint
    setattr(model.config, name, before)
    model(TOKENS)


def test_attributes_that_mean_nothing_are_left_alone(swarm: MakeSwarm):
    model = swarm("0:4").model()
    model.config.show_route = model.config.use_server_to_server = True
    model.config.max_retries = None
    model(TOKENS)


def test_the_config_says_how_the_model_was_opened(folder: Path, monkeypatch: pytest.MonkeyPatch):
    one, two = sorted(Identity.temporary().peer for _ in range(2))
    model = opened(
        folder,
        monkeypatch,
        initial_peers=["/a", "/b"],
        blocked_servers=[two, one],
        tuning_mode="ptune",
        pre_seq_len=4,
    )
    config = model.config
    assert (config.initial_peers, config.tuning_mode, config.pre_seq_len) == (["/a", "/b"], "ptune", 4)
    assert (config.allowed_servers, config.blocked_servers, config.active_adapter) == (None, [one, two], None)
    model.close()


# -- PETALS' names ----------------------------------------------------------------------------------------------------


def test_remote_sequential_is_what_blocks_are(swarm: MakeSwarm):
    model = swarm().model()
    assert isinstance(model.transformer.h, shoal.RemoteSequential)
    assert isinstance(model.model.layers, shoal.RemoteSequential)


def test_a_backbone_that_calls_its_layers_blocks_computes_what_one_machine_does(tmp_path: Path):
    whole = tiny_model(tiny_config("mpt", max_seq_len=2048)).float().eval()
    whole.save_pretrained(tmp_path)
    with swarm_of(tmp_path, "0:2", "2:5") as net, torch.no_grad():
        found = net.model(AutoDistributedModel)(TOKENS).last_hidden_state
    torch.testing.assert_close(found, whole.transformer(TOKENS).last_hidden_state)


@pytest.mark.parametrize("kind", [AutoDistributedModel, AutoDistributedModelForCausalLM])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom", "falcon", "mpt", "opt", "gptj", "mamba"])
def test_every_family_has_word_embeddings_and_blocks_by_petals_names(family: str, kind: type[Any], tmp_path: Path):
    tiny_model(tiny_config(family)).save_pretrained(tmp_path)
    runtime = Runtime()
    node = MemoryNetwork().node("client")
    model: Any = kind.from_checkpoint(Checkpoint.open(tmp_path), node, runtime, options=FLOAT32)
    names = [name for name, _ in model.named_modules()]
    assert model.transformer.h is model.blocks
    assert model.transformer.word_embeddings is model.get_input_embeddings()
    for twin in (model, copy.deepcopy(model)):
        assert twin.transformer.word_embeddings(PROMPT).shape[:2] == PROMPT.shape
        assert [name for name, _ in twin.named_modules()] == names  # nothing stands there twice
        twin.close()


def test_a_decoding_loop_of_petals_computes_what_one_machine_does(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    with torch.no_grad():
        hidden = model.transformer.h(model.transformer.word_embeddings(TOKENS))
        torch.testing.assert_close(model.lm_head(model.transformer.norm(hidden)), whole(TOKENS).logits)
