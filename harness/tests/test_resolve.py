"""From options to a stack: the ladder of bases, the modes, and every input that is refused."""

import json
import shutil

import pytest

from harness.errors import InputError
from harness.resolve import StackOptions, resolve_stack, stack_from_options


@pytest.fixture
def copies(tiny, tmp_path):
    """A writable copy of the tiny stack, in `tmp_path`; the adapters name `../base`."""
    for name, folder in {"base": tiny.base, **tiny.adapters}.items():
        shutil.copytree(folder, tmp_path / name)
    for name in tiny.adapters:
        set_config(tmp_path / name, base_model_name_or_path="../base")
    return tmp_path


def set_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def modes(stack):
    return [mode.name for mode in stack.modes]


def test_base_alone_has_the_base_mode(copies):
    assert modes(stack_from_options(StackOptions(base_model=str(copies / "base")))) == ["base"]


def test_single_adapter_has_two_modes(copies):
    stack = stack_from_options(StackOptions(lora_model=str(copies / "style")))
    assert modes(stack) == ["base", "lora"]


def test_pair_has_four_modes(copies):
    options = StackOptions(style_adapter="style", instruct_adapter="instruct")
    stack = stack_from_options(options, folder=copies)
    assert modes(stack) == ["base", "style", "instruct", "stacked"]
    assert [adapter.name for adapter in stack.adapters] == ["style", "instruct"]


def test_any_number_of_adapters_keeps_its_order(copies):
    shutil.copytree(copies / "style", copies / "third")
    weights = copies / "third" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    options = StackOptions(adapters=("c=third", "a=style", "b=instruct"))
    assert modes(stack_from_options(options, folder=copies)) == ["base", "c", "a", "b", "stacked"]


def test_modes_option_narrows_and_names(copies):
    options = StackOptions(adapters=("a=style", "b=instruct"), modes=("base,half=a*0.5", "a+b"))
    assert modes(stack_from_options(options, folder=copies)) == ["base", "half", "a+b"]


def test_option_beats_the_adapters_base(copies):
    shutil.copytree(copies / "base", copies / "other")
    stack = resolve_stack(base_model="other", adapters={"a": "style"}, folder=copies)
    assert (stack.base.path, stack.base.chosen_by) == (copies / "other", "--base-model")


def test_adapters_base_beats_the_default_folder(copies):
    shutil.copytree(copies / "base", copies / "Qwen3-8B-Base")
    stack = resolve_stack(adapters={"a": "style"}, folder=copies)
    assert stack.base.path == copies / "base"
    assert stack.base.chosen_by == "adapter_config.json of a"


def test_default_folder_is_used_when_nothing_names_a_base(copies):
    (copies / "base").rename(copies / "Qwen3-8B-Base")
    set_config(copies / "style", base_model_name_or_path=None)
    stack = resolve_stack(adapters={"a": "style"}, folder=copies)
    assert stack.base.path == copies / "Qwen3-8B-Base"
    assert stack.base.chosen_by.startswith("default")


def test_default_folder_stands_for_a_moved_base_of_its_name(copies):
    (copies / "base").rename(copies / "Qwen3-8B-Base")
    set_config(copies / "style", base_model_name_or_path="/training/box/Qwen3-8B-Base")
    stack = resolve_stack(adapters={"a": "style"}, folder=copies)
    assert stack.base.path == copies / "Qwen3-8B-Base"
    assert "names /training/box/Qwen3-8B-Base" in stack.base.chosen_by


def test_relative_base_is_found_wherever_the_folders_were_copied(copies, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.copytree(copies, elsewhere)
    stack = resolve_stack(
        adapters={"a": elsewhere / "style"}, folder=tmp_path_factory.getbasetemp()
    )
    assert stack.base.path == elsewhere / "base"


def test_declared_stack_brings_paths_stops_and_preset(copies):
    (copies / "stack.toml").write_text(
        'name = "mine"\nbase = "base"\npreset = "elegant_style"\n'
        '[adapters]\nstyle = "style"\ninstruct = "instruct"\n'
        '[stops]\nbase = "never"\nstacked = {min_rate = 0.9}\n'
    )
    stack = stack_from_options(StackOptions(stack_file=str(copies / "stack.toml")))
    assert (stack.name, stack.preset) == ("mine", "elegant_style")
    assert stack.stops == {"base": "never", "stacked": {"min_rate": 0.9}}
    assert stack.base.chosen_by == "base in stack.toml"


def test_embedded_stack_is_used_when_none_is_named():
    stack = stack_from_options(StackOptions())
    assert stack.name == "embedded-stages"
    assert modes(stack) == ["base", "style", "instruct", "stacked"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"style_adapter": "style"}, "--style-adapter: needs --instruct-adapter"),
        ({"instruct_adapter": "style"}, "--instruct-adapter: needs --style-adapter"),
        ({"lora_model": "style", "adapters": ("a=style",)}, "name the adapters in two ways"),
        ({"adapters": ("style",)}, "is not NAME=PATH"),
        ({"adapters": ("a=",)}, "is not NAME=PATH"),
        ({"adapters": ("a=style", "a=instruct")}, "two adapters are called 'a'"),
        ({"adapters": ("a=style", "b=style")}, "are the same folder"),
        ({"adapters": ("a.b=style",)}, "cannot be an adapter's name"),
        ({"adapters": ("base=style",)}, "is a mode's name"),
        ({"lora_model": "styel"}, "did you mean"),
        ({"lora_model": "./nowhere/at/all"}, "no such folder"),
        ({"lora_model": "style/adapter_config.json"}, "is no folder, and an adapter is one"),
        ({"lora_model": "."}, "holds no adapter_config.json → give .*style"),
        ({"base_model": "style"}, "this is an adapter's folder"),
        ({"base_model": "base", "stack_file": "stack.toml"}, "are both given"),
        ({"stack_file": "nope.toml"}, "is missing"),
        ({"lora_model": "style", "modes": ("stacked",)}, "unknown mode or adapter 'stacked'"),
    ],
)
def test_bad_options_are_refused(copies, monkeypatch, options, complaint):
    monkeypatch.chdir(copies)
    with pytest.raises(InputError, match=complaint) as caught:
        stack_from_options(StackOptions(**options))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("toml", "complaint"),
    [
        ("bse = 'base'", "unknown key 'bse'"),
        ("base = 3", "is not a string"),
        ("adapters = 3", "not a table of paths"),
        ("modes = 3", "3 is not a list of names"),
        ("modes = 'base'", "'base' is not a list of names"),
        ('modes = ["base", 1]', "is not a list of names"),
        ("base = 'base'\nstops = 3", "is not a table"),
        ("base = 'base'\n[stops]\nstacked = 'always'", "names 'stacked', which is no mode"),
        ("base = 'base'\n[stops]\nbase = 'sometimes'", "base: 'sometimes' declares no stopping"),
        ("base = 'base'\n[stops]\nbase = {min_rate = 2}", "min_rate"),
        ("base = ", "not valid TOML"),
    ],
)
def test_faulty_declaration_is_named(copies, toml, complaint):
    (copies / "stack.toml").write_text(toml)
    with pytest.raises(InputError, match=complaint):
        stack_from_options(StackOptions(stack_file=str(copies / "stack.toml")))


def test_adapters_that_name_different_bases_are_refused(copies):
    shutil.copytree(copies / "base", copies / "merged")
    set_config(copies / "instruct", base_model_name_or_path="../merged")
    adapters = {"style": "style", "instruct": "instruct"}
    with pytest.raises(InputError, match=r"different bases: style .*\.\./base, instruct .*merged"):
        resolve_stack(adapters=adapters, folder=copies)
    assert resolve_stack(adapters=adapters, base_model="base", folder=copies).adapters


def test_base_that_is_not_here_is_named(copies):
    set_config(copies / "style", base_model_name_or_path="/training/box/Llama")
    with pytest.raises(InputError, match=r"'/training/box/Llama' is not here → .*--base-model"):
        resolve_stack(adapters={"a": "style"}, folder=copies)


def test_no_base_at_all_is_named(copies):
    set_config(copies / "style", base_model_name_or_path=None)
    with pytest.raises(InputError, match=r"\./Qwen3-8B-Base does not exist"):
        resolve_stack(adapters={"a": "style"}, folder=copies)


def test_hub_id_out_of_reach_is_named(copies, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copies / "cache"))
    with pytest.raises(InputError, match=r"somebody/some-adapter@v1: .*local hub cache"):
        resolve_stack(adapters={"a": "somebody/some-adapter@v1"}, folder=copies)


def test_a_base_that_only_an_adapter_names_is_not_fetched(copies, monkeypatch):
    """What the user names may be downloaded; what a foreign file names may not."""
    import huggingface_hub
    from huggingface_hub import constants

    asked = []
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download",
        lambda *a, **kw: asked.append(kw["local_files_only"]) or real(*a, **kw),
    )  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copies / "cache"))
    file = copies / "style" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": "evil/huge"}
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"'evil/huge': no such folder.*hf download evil/huge"):
        resolve_stack(adapters={"a": "style"}, folder=copies)
    assert asked == [True]


def test_cached_hub_id_is_resolved_to_its_commit(copies, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = copies / "cache" / "models--somebody--style"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    shutil.copytree(copies / "style", repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copies / "cache"))
    stack = resolve_stack(base_model="base", adapters={"a": "somebody/style@v1"}, folder=copies)
    assert stack.adapters[0].revision == commit
    assert stack.adapters[0].path.name == commit


def test_adapter_of_another_shape_is_refused(copies, tmp_path_factory):
    from harness.testing.tiny import tiny_base

    wide = tiny_base(tmp_path_factory.mktemp("wide") / "base", hidden=64)
    with pytest.raises(InputError, match=r"needs a base weight of \[.*\], .* has \["):
        resolve_stack(base_model=wide, adapters={"a": "style"}, folder=copies)


def test_adapter_of_another_architecture_is_refused(copies):
    from safetensors.torch import load_file, save_file

    file = copies / "style" / "adapter_model.safetensors"
    tensors = {k.replace(".layers.", ".h."): v for k, v in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(InputError, match="none of its modules is in the base"):
        resolve_stack(base_model="base", adapters={"a": "style"}, folder=copies)


@pytest.mark.parametrize("changed", [False, True])
def test_copied_base_weight_must_be_the_bases_own(tmp_path, changed):
    from safetensors.torch import load_file, save_file

    from harness.testing.tiny import AdapterSpec, tiny_stack

    stack = tiny_stack(tmp_path, adapters={"a": AdapterSpec(targets=("q_proj", "lm_head"))})
    file = stack.adapters["a"] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.lm_head.base_layer.weight"
    tensors[key][0, 0] += changed
    save_file(tensors, file)
    if not changed:
        assert resolve_stack(adapters=stack.adapters).adapters
        return
    with pytest.raises(InputError, match=r"would be written over the base's 'lm_head\.weight'"):
        resolve_stack(adapters=stack.adapters)
