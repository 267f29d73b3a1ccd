"""A recipe file is read as it is written, or refused with every reason at once."""

import json
from pathlib import Path

import pytest

from tessera.recipe import Recipe, Schedule, UserError, load_recipe
from tests.recipe.examples import MINIMAL


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    return path


def complaints(file: Path, *overrides: str) -> list[str]:
    """The lines of the message without its first, which names the file and counts the others."""
    with pytest.raises(UserError) as error:
        load_recipe(file, overrides)
    head, *lines = str(error.value).splitlines()
    assert head.startswith(f"{file} with --set ") or head.startswith(f"{file}: ")
    assert f": {len(lines)} problem" in head
    return [line.removeprefix("  ") for line in lines]


def complaint(file: Path, *overrides: str) -> str:
    lines = complaints(file, *overrides)
    assert len(lines) == 1, lines
    return lines[0]


def test_a_minimal_recipe_has_the_defaults_of_the_report(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == "mine"
    assert recipe.numerics.precision == "fp8"
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert recipe.training.balance_loss_weight == 1e-4
    assert recipe.training.bias_update_speed == Schedule(0.001)
    assert recipe.data.fim_rate == 0.1
    assert recipe.data.cross_document_attention


def test_a_recipe_cannot_be_changed_after_it_was_checked(file: Path) -> None:
    recipe = load_recipe(file)
    with pytest.raises(Exception, match="frozen"):
        recipe.training.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("model.hiden_size=3", "model.hiden_size = 3: unknown key; did you mean model.hidden_size?"),
        ("optimizer.steps=3", "optimizer.steps = 3: unknown key; did you mean training.steps?"),
        ("steps=3", "steps = 3: unknown key; did you mean training.steps?"),
        ("modle.hidden_size=3", "[modle]: unknown section; did you mean [model]?"),
        ("modle=3", "modle = 3: unknown key; did you mean model?"),
        (
            "optimizer.lr=3",
            "optimizer.lr = 3: unknown key; allowed here: learning_rate, beta1, beta2, epsilon, weight_decay, "
            "gradient_clip, moments",
        ),
        (
            "zzz=3",
            "zzz = 3: unknown key; allowed here: schema, name, model, numerics, memory, data, optimizer, training, "
            "checkpoint, stability",
        ),
        (
            "training.checkpoint_interval=3",
            "training.checkpoint_interval = 3: unknown key; did you mean checkpoint.interval?",
        ),
        (
            "training.keep_checkpoints=3",
            "training.keep_checkpoints = 3: unknown key; did you mean checkpoint.keep_latest?",
        ),
        (
            "optimizer.learning_rate=[{shape='linear', steps=3, to=1, form=2}]",
            "optimizer.learning_rate[0].form = 2: unknown key; did you mean optimizer.learning_rate[0].from?",
        ),
        (
            'model."hidden_size"=256',
            'model."\\"hidden_size\\"" = 256: unknown key; did you mean model.hidden_size?',
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_or_with_all(file: Path, wrong: str, message: str) -> None:
    assert complaint(file, wrong) == message


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("model=3", "model = 3: must be table"),
        ("model.hidden_size=128.0", "model.hidden_size = 128.0: must be integer >= 1"),
        ("model.hidden_size=true", "model.hidden_size = true: must be integer >= 1"),
        ("model.hidden_size='128'", 'model.hidden_size = "128": must be integer >= 1'),
        ("model.hidden_size=2020-01-01", "model.hidden_size = 2020-01-01: must be integer >= 1"),
        ("model.hidden_size=[1]", "model.hidden_size = [1]: must be integer >= 1"),
        ("model.norm_topk_prob=1", "model.norm_topk_prob = 1: must be true or false"),
        ("model.q_lora_rank=false", "model.q_lora_rank = false: must be integer >= 1"),
        ("model.rope_scaling=yarn", 'model.rope_scaling = "yarn": must be table'),
        ("data.source=3", "data.source = 3: must be string or list of strings"),
        ("data.source=[]", "data.source = []: must be string or list of strings"),
        ("data.source={a=1}", "data.source = { a = 1 }: must be string or list of strings"),
        ("data.source=['a', 3]", "data.source[1] = 3: must be string"),
        ("data.extensions='txt'", 'data.extensions = "txt": must be list of strings, not empty'),
        ("data.tokenizer=", 'data.tokenizer = "": must be string, not empty'),
        (
            "optimizer.learning_rate=true",
            "optimizer.learning_rate = true: must be number >= 0 or list of segments",
        ),
        (
            "optimizer.learning_rate=x",
            'optimizer.learning_rate = "x": must be number >= 0 or list of segments',
        ),
        (
            "optimizer.learning_rate=[]",
            "optimizer.learning_rate = []: must be number >= 0 or list of segments",
        ),
        ("optimizer.learning_rate=[1]", "optimizer.learning_rate[0] = 1: must be table"),
        (
            "optimizer.learning_rate={shape='linear', steps=3, to=1}",
            'optimizer.learning_rate = { shape = "linear", steps = 3, to = 1 }: must be number >= 0 or list of '
            "segments",
        ),
    ],
)
def test_a_value_of_another_type_is_answered_with_the_right_one(file: Path, wrong: str, message: str) -> None:
    assert complaint(file, wrong) == message


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("model.hidden_size=0", "model.hidden_size = 0: must be integer >= 1"),
        ("model.n_routed_experts=1", "model.n_routed_experts = 1: must be integer >= 2"),
        ("model.q_lora_rank=-1", "model.q_lora_rank = -1: must be integer >= 1"),
        ("model.rope_theta=1", "model.rope_theta = 1: must be number > 1"),
        ("optimizer.beta1=1.0", "optimizer.beta1 = 1.0: must be number >= 0 and < 1"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1: must be number >= 0 or list of segments"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate = nan: must be number >= 0 or list of segments"),
        ("optimizer.epsilon=inf", "optimizer.epsilon = inf: must be number > 0"),
        ("numerics.promotion_interval=33", "numerics.promotion_interval = 33: must be integer >= 32, a multiple of 32"),
        ("numerics.precision=fp9", 'numerics.precision = "fp9": must be "fp8", "bf16" or "fp32"; did you mean "fp8"?'),
        (
            "numerics.scales=deepseek",
            'numerics.scales = "deepseek": must be "power_of_two", "float32" or "deepseek-v3"; did you mean '
            '"deepseek-v3"?',
        ),
        ("model.tie_word_embeddings=true", "model.tie_word_embeddings = true: must be false only"),
        ("model.scoring_func=softmax", 'model.scoring_func = "softmax": must be "sigmoid" only'),
        ("schema=0", "schema = 0: must be integer >= 1 and <= 1"),
        ("training.validation_batches=0", "training.validation_batches = 0: must be integer >= 1"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_answered_with_the_range(file: Path, wrong: str, message: str) -> None:
    assert complaint(file, wrong) == message


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "tiny(1)", "a\\b", "-x", "a\u0000", "a\n", " a"])
def test_a_name_that_is_no_name_of_a_folder_is_refused(file: Path, name: str) -> None:
    line = complaint(file, f"name={json.dumps(name)}")
    assert line.startswith("name = ")
    assert "must be letters, digits, . _ - and blanks, and begin with a letter, a digit or _" in line


def test_a_number_too_large_for_a_float_is_refused(file: Path) -> None:
    line = complaint(file, "optimizer.epsilon=1" + "0" * 400)
    assert line.endswith("...: must be number > 0")
    assert len(line) < 120


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["model.n_group=3"], "model.n_group: 3 must divide n_routed_experts = 8"),
        (["model.n_group=4", "model.topk_group=5"], "model.topk_group: 5 must not exceed n_group = 4"),
        (["model.n_group=8", "model.topk_group=8"], "n_group may be 4 at most"),
        (["model.n_group=4", "model.num_experts_per_tok=3"], "3 must not exceed the 2 experts of the topk_group = 1"),
        (["model.num_experts_per_tok=9"], "model.num_experts_per_tok: 9 must not exceed the 8 experts"),
        (["model.first_k_dense_replace=4"], "4 must not exceed num_hidden_layers = 3"),
        (["model.qk_rope_head_dim=3"], "model.qk_rope_head_dim: 3 must be even"),
        (
            ["model.rope_scaling={factor=2, original_max_position_embeddings=8, beta_slow=32}"],
            "model.rope_scaling.beta_slow: 32 must be below beta_fast = 32",
        ),
        (["numerics.accumulation=hopper_unpromoted"], 'set tiles = "row" or "tensor"'),
        (["numerics.promotion_interval=256"], "numerics.promotion_interval: 256 must be 32, 64 or 128"),
        (["numerics.tiles=row", "numerics.gradient_tiles=block"], 'gradient_tiles: "block" needs tiles = "block"'),
        (["optimizer.beta2=0.999"], 'optimizer.beta2: 0.999 must be at most 0.99 with moments = "bf16"'),
        (["data.batch_size=2.5"], "data.batch_size: 2.5 must be a whole number of sequences"),
        (["data.batch_size=[{shape='linear', steps=3, to=4}]"], "data.batch_size: 0 must be a whole number"),
        (["training.micro_batch_size=3"], "micro_batch_size: 3 must divide every data.batch_size, among them 4"),
        (["training.micro_batch_size=8"], "8 must divide every data.batch_size, among them 4"),
        (["model.max_position_embeddings=15"], "16 must not exceed model.max_position_embeddings = 15"),
        (["model.num_nextn_predict_layers=16"], "16 must exceed model.num_nextn_predict_layers = 16"),
        (["data.source=['a', '']"], "data.source: an empty string names no text"),
        (["data.extensions=['txt']"], 'data.extensions: "txt" must start with a dot'),
        (["optimizer.learning_rate=[{shape='constant', steps=2, from=1, to=1}]"], "[0].from: has no meaning"),
    ],
)  # fmt: skip
def test_an_impossible_combination_is_named_with_both_sides(file: Path, wrong: list[str], message: str) -> None:
    assert message in complaint(file, *wrong)


@pytest.mark.parametrize(
    "right",
    [
        ["model.n_group=4", "model.topk_group=4"],
        ["model.n_group=4", "model.num_experts_per_tok=2"],
        ["model.num_experts_per_tok=8"],
        ["model.first_k_dense_replace=3"],
        ["model.first_k_dense_replace=0"],
        ["numerics.tiles=row", "numerics.accumulation=hopper_unpromoted", "numerics.promotion_interval=512"],
        ["numerics.tiles=tensor"],
        ["optimizer.beta2=0.999", "optimizer.moments=fp32"],
        ["optimizer.beta2=0.99"],
        ["training.micro_batch_size=4"],
        ["data.batch_size=[{shape='linear', steps=3, from=2, to=4}]", "training.micro_batch_size=2"],
        ["model.max_position_embeddings=16"],
        ["model.num_nextn_predict_layers=15"],
        ["model.num_nextn_predict_layers=0", "data.sequence_length=1"],
        ["data.source=['a', 'b']"],
    ],
)
def test_what_lies_just_inside_the_rules_is_accepted(file: Path, right: list[str]) -> None:
    assert load_recipe(file, right) != load_recipe(file)


def test_a_width_of_zero_for_the_queries_latent_means_none_as_in_config_json(file: Path) -> None:
    assert load_recipe(file, ["model.q_lora_rank=0"]).model.q_lora_rank is None
    assert load_recipe(file, ["model.q_lora_rank=6"]).model.q_lora_rank == 6


def test_all_problems_of_a_file_are_listed_at_once(file: Path) -> None:
    lines = complaints(
        file,
        "model.hidden_size=-3",
        "model.hiden_size=3",
        "optimizer.beta2=0.999",
        "training.steps=many",
        "data.extensions=['txt', 'md']",
        "numercs.precision=fp8",
        "name=a/b",
    )
    assert sorted(line.split(maxsplit=1)[0].rstrip(":") for line in lines) == [
        "[numercs]", "data.extensions", "data.extensions", "model.hidden_size", "model.hiden_size", "name",
        "optimizer.beta2", "training.steps",
    ]  # fmt: skip


def test_every_missing_key_is_listed_with_what_it_may_hold(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("[model]\nvocab_size = 3\n")
    lines = complaints(tmp_path / "empty.toml")
    assert "model.hidden_size is missing: integer >= 1" in lines
    assert "data is missing: table" in lines
    assert "model.vocab_size" not in " ".join(lines)


def test_an_absent_file_is_answered_with_its_neighbour(file: Path) -> None:
    with pytest.raises(UserError, match=r"mien\.toml: no such recipe file; did you mean .*mine\.toml\?"):
        load_recipe(file.with_name("mien.toml"))
    with pytest.raises(UserError, match=r"mine: no such recipe file; did you mean .*mine\.toml\?"):
        load_recipe(file.with_name("mine"))
    with pytest.raises(UserError, match=r"absent/x\.toml: no such recipe file$"):
        load_recipe(file.parent / "absent" / "x.toml")


def test_what_is_no_toml_file_is_refused_with_the_place(file: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_recipe(file.parent)
    file.write_text("[model\n")
    with pytest.raises(UserError, match=r"mine\.toml: not valid TOML: .*line 1"):
        load_recipe(file)
    file.write_bytes(b"name = '\xff'")
    with pytest.raises(UserError, match=r"mine\.toml: byte 8 is not UTF-8"):
        load_recipe(file)
    file.write_text("name = 'a'\nname = 'b'\n")
    with pytest.raises(UserError, match=r"mine\.toml: not valid TOML: Cannot overwrite"):
        load_recipe(file)


def test_a_byte_order_mark_is_no_part_of_the_recipe(file: Path) -> None:
    file.write_text("\ufeff" + MINIMAL, encoding="utf-8")
    assert load_recipe(file).name == "mine"


def test_a_recipe_of_a_newer_version_is_said_to_be_one_whatever_else_it_holds(file: Path) -> None:
    file.write_text("schema = 2\nnew_key = 1\n" + MINIMAL)
    with pytest.raises(UserError, match=r"mine\.toml: schema = 2: this tessera reads .* up to schema 1; upgrade"):
        load_recipe(file)


@pytest.mark.parametrize(
    "override, get, value",
    [
        ("optimizer.learning_rate=1e-2", lambda r: r.optimizer.learning_rate.at(0), 0.01),
        ("optimizer.learning_rate=1", lambda r: r.optimizer.learning_rate.at(0), 1.0),
        ("model.hidden_size = 256", lambda r: r.model.hidden_size, 256),
        (" model . hidden_size=256 # wide", lambda r: r.model.hidden_size, 256),
        ("model.hidden_size=1_28", lambda r: r.model.hidden_size, 128),
        ("data.source=notes.txt", lambda r: r.data.source, "notes.txt"),
        ("data.source='notes.txt'", lambda r: r.data.source, "notes.txt"),
        ("data.source=a=b", lambda r: r.data.source, "a=b"),
        ("data.source=/home/me/my texts", lambda r: r.data.source, "/home/me/my texts"),
        ("data.source=a\nseed = 3", lambda r: (r.data.source, r.data.seed), ("a\nseed = 3", 0)),
        ("data.source='a'\nseed = 3", lambda r: (r.data.source, r.data.seed), ("'a'\nseed = 3", 0)),
        ('data.source=["a", "b"]', lambda r: r.data.source, ("a", "b")),
        ("numerics.precision=bf16", lambda r: r.numerics.precision, "bf16"),
        ("training.tensorboard=true", lambda r: r.training.tensorboard, True),
        ("name=other", lambda r: r.name, "other"),
        ("model.rope_scaling.factor=4", lambda r: r.model.rope_scaling.factor, 4.0),
    ],
)
def test_an_override_is_toml_or_a_bare_string(file: Path, override: str, get, value: object) -> None:
    file.write_text(MINIMAL + "[model.rope_scaling]\nfactor = 2\noriginal_max_position_embeddings = 8\n")
    assert get(load_recipe(file, [override])) == value


def test_the_last_override_of_a_key_counts(file: Path) -> None:
    assert load_recipe(file, ["training.steps=3", "training.steps=7"]).training.steps == 7


def test_an_override_can_open_a_section_that_the_file_does_not_have(file: Path) -> None:
    assert load_recipe(file, ["numerics.tiles=row"]).numerics.tiles == "row"


def test_the_message_says_which_overrides_took_part(file: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.toml with --set training\.steps=0 --set name=x: 1 problem"):
        load_recipe(file, ["training.steps=0", "name=x"])


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.steps", "must be section.key=value, such as"),
        ("=3", "must be section.key=value"),
        (".steps=3", "must be section.key=value"),
        ("training..steps=3", "must be section.key=value"),
        ("training.steps.x=3", "steps is a value, not a section"),
        ("data.source=['a'", "the value is not valid TOML: Unclosed array"),
        ("data.source='a", "the value is not valid TOML"),
        ("data.source=\udcff", "is not UTF-8"),
    ],
)
def test_an_override_of_the_wrong_form_is_quoted(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(file, [override])
    assert str(error.value).startswith("--set ")
    assert message in str(error.value)
    str(error.value).encode()  # can be printed


def test_batches_are_whole_micro_batches_and_sum_to_the_tokens_of_the_run(file: Path) -> None:
    ramp = "data.batch_size=[{shape='linear', steps=7, from=4, to=16}]"
    recipe = load_recipe(file, [ramp, "training.micro_batch_size=4"])
    sizes = [recipe.batch_size_at(step) for step in range(10)]
    plain = [4 + 12 * step / 7 for step in range(7)] + [16.0] * 3
    assert all(size % 4 == 0 and abs(size - exact) <= 2 for size, exact in zip(sizes, plain, strict=True))
    assert recipe.total_tokens() == 16 * sum(sizes)


def test_a_recipe_made_in_python_is_checked_as_a_file_is() -> None:
    with pytest.raises(ValueError, match="hidden_size"):
        Recipe.model_validate({"name": "x", "model": {"hidden_size": "8"}})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("stability.on_nonfinite=note", '"note": must be "stop", "skip" or "lower"'),
        ("stability.on_spike=skp", '"skp": must be "note", "skip", "lower" or "stop"; did you mean "skip"?'),
        ("stability.spike_window=1", "1: must be integer >= 2"),
        ("stability.spike_deviations=0.5", "0.5: must be number >= 1"),
        ("stability.lower_factor=1.0", "1.0: must be number > 0 and < 1"),
        ("stability.lower_factor=0", "0: must be number > 0 and < 1"),
        ("stability.max_consecutive=1", "1: must be integer >= 2"),
    ],
)
def test_the_rules_for_unstable_steps_have_their_bounds(file: Path, wrong: str, message: str) -> None:
    assert complaint(file, wrong) == f"{wrong.partition('=')[0]} = {message}"


def test_a_recipe_that_says_nothing_of_stability_stops_at_nan_and_notes_spikes(file: Path) -> None:
    stability = load_recipe(file).stability
    assert (stability.on_nonfinite, stability.on_spike) == ("stop", "note")
    assert (stability.spike_window, stability.spike_deviations) == (128, 6.0)  # those of OLMo-core
    assert load_recipe(file, ["stability.on_spike=skip"]).stability.on_spike == "skip"
