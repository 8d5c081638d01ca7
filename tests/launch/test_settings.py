"""One line of words makes two configurations, or is refused in one line."""

import pytest

from core.errors import SpotforgeError
from launch.config import PoolConfig, PoolKind
from launch.settings import compose_settings
from trainer.model_config import NamedModelConfig


def test_words_go_where_they_belong():
    settings = compose_settings(["model=tiny", "launch.deadline=36h", "seed=3", "launch.gpus=[L4]"])
    assert isinstance(settings.trainer.model, NamedModelConfig) and settings.trainer.seed == 3
    assert settings.launch.deadline_h == 36 and settings.launch.gpus == ["L4"]
    assert settings.overrides == ("model=tiny", "seed=3")


def test_keys_of_the_users_own():
    words = ["launch.discounts.aws=0.2", "launch.quotas={aws/ap-south-1/H100/spot:16}"]
    pools = "launch.pools={lab:{kind:ssh,gpu:H100,gpus_per_node:8}}"
    launch = compose_settings([*words, pools]).launch
    assert launch.discounts == {"aws": 0.2}
    assert launch.quotas == {"aws/ap-south-1/H100/spot": 16}
    assert launch.pools == {"lab": PoolConfig(PoolKind.ssh, "H100", 8)}


def test_a_list_of_one_needs_no_brackets():
    launch = compose_settings(["launch.gpus=h100,L4", "launch.nodes=3", "launch.clouds=[]"]).launch
    assert (launch.gpus, launch.nodes, launch.clouds) == (["h100", "L4"], [3], [])


def test_a_teams_own_file(tmp_path):
    (tmp_path / "launch").mkdir()
    for head in ("", "defaults: [default, _self_]\n", "defaults: [/schema/launch@_here_]\n"):
        text = f"{head}discounts: {{aws: 0.3}}\nmax_price_age: 5d\n"
        (tmp_path / "launch/team.yaml").write_text(text)
        launch = compose_settings(["launch=team", "launch.max_price_age=6d"], tmp_path).launch
        assert launch.discounts == {"aws": 0.3} and launch.max_price_age == "6d"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"discounts: {aws: 0.3", "is not YAML: .*team.yaml"),
        (b"clouds: [\xff]", "a file that is not UTF-8"),
        (b"discount: {aws: 0.3}", "launch.discount=.*no such key"),
        (b"- 1", "list is not a subclass of LaunchConfig"),
    ],
)
def test_a_teams_file_with_something_wrong(tmp_path, content, said):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/team.yaml").write_bytes(content)
    with pytest.raises(SpotforgeError, match=said) as e:
        compose_settings(["launch=team"], tmp_path)
    assert e.value.exit_code == 2 and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launch.foo=1", "launch.foo=1: there is no such key"),
        ("launch.budget=200", "did you mean launch.budget_usd?"),
        ("launch.slurm.time=1h", "did you mean launch.slurm.time_limit?"),
        ("launch.workdir=null", "did you mean launch.skypilot.workdir?"),
        ("launch.nodes=a", "launch.nodes[0]=a: "),
        ("launch.gpus=", "launch.gpus=: "),
        ("launch.name=[\u0928", "launch.name=[\u0928: cannot be read"),
        ("run.name=[\u0928", "run.name=[\u0928: cannot be read"),
        ("launch.foo", "launch.foo: is not key=value"),
        ("+launch.foo=1", "launch.foo=1: there is no such key"),
        ("launch.spot=yes", "launch.spot=yes: "),
        ("launch.discounts={aws:15}", "launch.discounts.aws=15.0: must be"),
        ("launch.pools={lab:{kidn:ssh}}", "did you mean launch.pools.lab.kind?"),
        ("launch.pools={lab:{kind:ssh,gpu:H100}}", "gpus_per_node"),
        ("launch.nodes=[0]", "launch.nodes=0: must be from 1 to"),
        ("launch=null", "launch=null: Config group override must be"),
        ("launch.quotas={aws:-1}", "launch.quotas.aws=-1: must be from 0 to"),
        ("launch.secrets=[A-B]", "launch.secrets=A-B: "),
        ("launch.env={1A:b}", "launch.env=1A: "),
        ("launch.pools={lab:{kind:ssh,gpu:H100,gpus_per_node:0}}", "gpus_per_node=0: must be"),
        ("launch.max_price_age=30", "launch.max_price_age=30: "),
        ("launch.data_gb=-1", "launch.data_gb=-1.0: must be from 0 to"),
    ],
)
def test_refusals(word, said):
    with pytest.raises(SpotforgeError) as e:
        compose_settings([word])
    assert e.value.exit_code == 2 and said in str(e.value) and "\n" not in str(e.value)
