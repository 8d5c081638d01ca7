"""Settings: rules of fields, words on a line, and what is said of those that cannot be."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
from omegaconf import MISSING

from compression.command import COMPRESSION
from core.errors import ConfigError
from core.settings.command import Command, without
from core.settings.help import help_page
from core.settings.keys import keys_of
from core.settings.rules import check_settings, setting
from launch.settings import LAUNCH
from serving.batches.worker import WORKER
from serving.command import SERVING
from trainer.command import TRAINER


class Colour(Enum):
    red = "red"
    green = "green"


@dataclass
class Wheel:
    """A wheel.

    Attributes:
        spokes: How many. More than a few, e.g. twenty.
        tyre: What it has.
    """

    spokes: int = setting(20, least=3, most=40)
    tyre: str = "wide"


@dataclass
class Bicycle:
    """A bicycle.

    Attributes:
        name: What it is called.
        gears: How many there are; null: it is fixed.
        weight: In kg.
        colour: How it looks.
        bells: What rings.
        front: See `Wheel`.
        spares: Further wheels, by name.
        prices: In euros, by shop.
        notes: Whatever there is to say.
    """

    name: str = MISSING
    gears: int | None = setting(None, above=0)
    weight: float = setting(9.5, above=0, below=math.inf)
    colour: Colour = Colour.red
    bells: list[str] = field(default_factory=list)
    front: Wheel = field(default_factory=Wheel)
    spares: dict[str, Wheel] = field(default_factory=dict)
    prices: dict[str, float] = setting(factory=dict, least=0)
    notes: dict[str, Any] = field(default_factory=dict)

    def cross_check(self, key: str) -> None:
        if self.name == "fixie" and self.gears is not None:
            raise ConfigError("gears", self.gears, "a fixie has none", "leave it out")


BICYCLE = Command(
    program="python -m bicycle",
    about="Ride.",
    schema=Bicycle,
    root="bicycle",
    short={"n": "name"},
    sweeps=True,
)


def refused(*words):
    with pytest.raises(ConfigError) as error:
        BICYCLE.compose(words)
    assert "\n" not in str(error.value)
    return error.value


def test_words_become_typed_settings():
    ride = BICYCLE.compose(["n=fixie", "weight=8", "colour=green", "front.spokes=32"])
    assert (ride.name, ride.weight, ride.colour, ride.front.spokes) == (
        "fixie",
        8.0,
        Colour.green,
        32,
    )


def test_keys_that_users_name_need_no_plus():
    ride = BICYCLE.compose(
        ["name=x", "spares.left.spokes=24", "spares.left.tyre=slim", "prices.shop.v1/b=3"]
    )
    assert ride.spares == {"left": Wheel(24, "slim")} and ride.prices == {"shop.v1/b": 3.0}
    ride = BICYCLE.compose(["name=x", "spares={a:{spokes:4},b:{}}", "notes.a.b=1"])
    assert ride.spares == {"a": Wheel(4), "b": Wheel()} and ride.notes == {"a": {"b": 1}}


def test_a_list_of_one_needs_no_brackets():
    assert BICYCLE.compose(["name=x", "bells=ding"]).bells == ["ding"]
    assert BICYCLE.compose(["name=x", "bells=[ding,dong]"]).bells == ["ding", "dong"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"gears": 0}, "gears"),
        ({"weight": math.nan}, "weight"),
        ({"weight": math.inf}, "weight"),
        ({"front": Wheel(2)}, "front.spokes"),
        ({"spares": {"left": Wheel(41)}}, "spares.left.spokes"),
        ({"prices": {"shop": -1.0}}, "prices.shop"),
        ({"gears": 7, "name": "fixie"}, "gears"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_its_whole_key(changes, key):
    check_settings(Bicycle(name="fixie"), "mine")
    with pytest.raises(ConfigError) as error:
        check_settings(Bicycle(**{"name": "x"} | changes))
    assert error.value.key == key


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("front.spokes=2", "front.spokes"),
        ("+front.rim=3", "front.rim"),
        ("gears=many", "gears"),
        ("colour=blue", "colour"),
        ("spares.left.spoke=24", "spares.left.spoke"),
    ],
)
def test_what_cannot_be_composed_is_refused_by_its_whole_key(word, key):
    assert refused("name=x", word).key == key


def test_bounds_are_in_or_out_as_they_say():
    @dataclass
    class Bounded:
        x: float = setting(1.0, above=0, most=2)
        y: float = setting(1.0, least=0, below=2)

    for good in (Bounded(1e-9, 0.0), Bounded(2.0, 1.999)):
        check_settings(good)
    for bad, key in ((Bounded(x=0.0), "a.x"), (Bounded(x=2.1), "a.x"), (Bounded(y=2.0), "a.y")):
        with pytest.raises(ConfigError) as error:
            check_settings(bad, "a")
        assert error.value.key == key


def test_what_is_missing_or_given_twice():
    assert refused().key == "name"
    assert refused("name=x", "gears=1", "n=y").value == "y"
    assert refused("name=x", "gears=1", "+gears=2").key == "gears"
    tied = "model.config.tie_word_embeddings"
    assert TRAINER.compose([f"~{tied}", f"+{tied}=3"]).model.config["tie_word_embeddings"] == 3


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("gear=3", "gears"),
        ("front.spoke=3", "front.spokes"),
        ("frnt.spokes=3", "front.spokes"),
        ("spokes=3", "front.spokes"),
        ("spares.left.tire=3", "spares.left.tyre"),
    ],
)
def test_a_misspelt_key_is_told_from_the_one_that_is_near(word, near):
    assert refused("name=x", word).fix == f"did you mean {near}?"


def test_names_arrive_as_they_are_typed():
    ride = BICYCLE.compose(["n=~/[a] (é)", "bells=é", "spares.a.tyre=größe"])
    assert (ride.name, ride.bells, ride.spares["a"].tyre) == ("~/[a] (é)", ["é"], "größe")


def test_a_key_may_be_named_like_a_group_of_another_program():
    @dataclass
    class Bill:
        """A bill.

        Attributes:
            checkpoint: Where it is paid.
        """

        checkpoint: str = "till"

    bill = Command(program="python -m bill", about="Pay.", schema=Bill, root="bill")
    assert bill.compose(["checkpoint=door"]) == Bill("door")


def test_a_program_learns_which_keys_were_given():
    given = []
    words = ["n=x", "+notes.a=1", "spares.a.spokes=4"]
    assert BICYCLE.main(lambda config, job: given.append(job.given) or 0, words) == 0
    assert given == [{"name", "notes.a", "spares.a.spokes"}]


@pytest.mark.parametrize("word", ["gears", "name='x", "bells=[a", "gears=1,2", "hydra.run.dir=x"])
def test_words_that_cannot_be_read(word):
    assert word.partition("=")[0] in str(refused(word))


def test_options_and_words_come_in_any_order(tmp_path):
    given = ["-cd", str(tmp_path), "name=x", "--multirun", "gears=1,2", "--cfg=job", "+a=1"]
    line = TRAINER.read(given)
    assert line.words == ("name=x", "gears=1,2", "+a=1")
    assert (line.config_dir, line.show, line.flags) == (tmp_path, "job", {"--multirun"})


@pytest.mark.parametrize(
    "arguments",
    [["--mutlirun"], ["--cfg"], ["--cfg=x"], ["--config-dir=x"], ["--help", "--help"], ["-x"]],
)
def test_options_that_there_are_not(arguments, capsys):
    assert BICYCLE.main(lambda config, job: 0, arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_sweep_runs_all_combinations_and_none_when_one_is_refused(capsys):
    ran = []

    def run(config, job):
        ran.append((config.gears, config.colour, job.change))
        return 0

    words = ["--multirun", "name=x", "gears=1,2", "colour=red,green"]
    assert BICYCLE.main(run, words) == 0
    assert ran == [
        (1, Colour.red, "gears=1,colour=red"),
        (1, Colour.green, "gears=1,colour=green"),
        (2, Colour.red, "gears=2,colour=red"),
        (2, Colour.green, "gears=2,colour=green"),
    ]
    ran.clear()
    assert BICYCLE.main(run, ["-m", "name=x", "gears=1,0"]) == 2 and not ran
    assert capsys.readouterr().err.startswith("gears=0: ")
    assert BICYCLE.main(lambda config, job: 33, ["name=x"]) == 33


def test_a_folder_of_the_users_own_may_be_called_anything(tmp_path):
    folder = tmp_path / "it's [my] größe, é"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    assert TRAINER.compose(["experiment=mine"], folder).seed == 7
    with pytest.raises(ConfigError) as error:
        TRAINER.compose(["experiment=mime"], folder)
    assert error.value.key == "experiment" and "did you mean mine?" in error.value.fix


def test_an_option_without_a_schema_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("model_type: llama\n")
    with pytest.raises(ConfigError, match="model=.*/schema/model/named"):
        TRAINER.compose(["model=mine"], tmp_path)


@pytest.mark.parametrize(
    ("command", "word", "fix"),
    [
        (TRAINER, "parallel.offload_optimizer=true", "it is a key of parallel=zero"),
        (TRAINER, "paralel=fsdp", "did you mean parallel?"),
        (TRAINER, "recipe=heal", ""),
        (COMPRESSION, "recipe.int8_weight_only.bit=4", "recipe.int8_weight_only.bits"),
        (SERVING, "engine.max_contxt=5", "did you mean engine.max_context?"),
        (LAUNCH, "launch.slurm.time=1h", "did you mean launch.slurm.time_limit?"),
    ],
)
def test_near_names_in_each_program(command, word, fix):
    with pytest.raises(ConfigError) as error:
        command.compose([word])
    assert error.value.key == word.partition("=")[0] and fix in error.value.fix


@pytest.mark.parametrize("command", [TRAINER, COMPRESSION, SERVING, LAUNCH, WORKER, BICYCLE])
def test_help_tells_of_every_key(command):
    silent = [key.path for key in command.keys if not key.about]
    assert silent == [], "a docstring has no line about it"
    page = help_page(command)
    short = {path: name for name, path in command.short.items()}
    for key in command.keys:
        assert f"  {short.get(key.path, key.path)}" in page
    assert all(len(line) <= 100 for line in page.splitlines())


def test_help_has_the_first_sentence_and_the_choices():
    page = help_page(BICYCLE)
    assert "How many\n" in page and "How it looks (red | green)" in page
    assert [key.path for key in keys_of(Wheel, "w")] == ["w.spokes", "w.tyre"]


def test_words_give_way_to_others():
    assert without(["a=1", "b=2"], ["+b=3", "c=4"]) == ["a=1"]
