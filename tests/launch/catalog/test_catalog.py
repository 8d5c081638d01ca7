"""Prices: read, dated, refused when old or odd, made one's own."""

import datetime
import json
import os
import random
import time

import pytest

from core.errors import ConfigError, DamagedError
from launch.__main__ import main
from launch.catalog.catalog import load_catalog, quota_of, read_skypilot_folder
from launch.catalog.egress import egress_usd
from launch.catalog.gpus import gpu_of, known_gpu
from launch.catalog.regions import residency_refusal
from launch.catalog.snapshot import read_snapshot, write_snapshot
from launch.settings import compose_settings
from tests.launch.offers import offer

AWS = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice"
AWS_ROWS = f"""{AWS},Region,AvailabilityZone,Arch
p5.48xlarge,H100,8.0,192,2048,"{{'Gpus': []}}",98.32,30.5,ap-south-1,ap-south-1a,x86_64
p5.48xlarge,H100,8.0,192,2048,"{{'Gpus': []}}",98.32,,ap-south-1,ap-south-1b,x86_64
m5.large,,,2,8,,0.1,0.03,ap-south-1,ap-south-1a,x86_64
odd.large,Gaudi,1.0,2,8,,0.1,0.03,ap-south-1,ap-south-1a,x86_64
"""
GCP_ROWS = """\
InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice
,,,A100,8.0,x,us-central1,us-central1-a,20.0,6.0
a2-highgpu-8g,96,680,,,,us-central1,us-central1-a,5.0,1.5
a2-highgpu-4g,48,340,,,,us-central1,us-central1-a,2.5,0.7
,,,V100,1.0,x,us-central1,us-central1-a,2.5,0.8
n1-standard-4,4,15,,,,us-central1,us-central1-a,0.2,0.05
n1-highmem-8,8,52,,,,us-central1,us-central1-a,0.5,0.1
n1-standard-8,8,30,,,,us-central1,us-central1-a,0.4,0.08
n1-standard-16,16,60,,,,us-central1,us-central1-a,0.8,0.2
,,,A100,8.0,x,us-east1,us-east1-b,20.0,6.0
,,,tpu-v3-8,1.0,x,us-central1,us-central1-a,8.0,2.0
"""
TODAY = datetime.date(2026, 6, 1)


@pytest.fixture
def skypilot(tmp_path):
    """A folder as SkyPilot leaves it."""
    for cloud, text in (("aws", AWS_ROWS), ("gcp", GCP_ROWS)):
        (tmp_path / cloud).mkdir()
        (tmp_path / cloud / "vms.csv").write_text(text)
    return tmp_path


def loaded(*words, date=TODAY):
    return load_catalog(compose_settings(words).launch, date)


def test_skypilots_catalogs(skypilot):
    offers = read_skypilot_folder(skypilot).offers
    found = [(o.place, o.instance_type, o.gpu, o.gpus_per_node, o.is_spot) for o in offers]
    zone = "gcp/us-central1/us-central1-a"
    assert found == [
        ("aws/ap-south-1/ap-south-1a", "p5.48xlarge", "H100", 8, False),
        ("aws/ap-south-1/ap-south-1a", "p5.48xlarge", "H100", 8, True),
        ("aws/ap-south-1/ap-south-1b", "p5.48xlarge", "H100", 8, False),
        (zone, "a2-highgpu-8g", "A100", 8, False),
        (zone, "a2-highgpu-8g", "A100", 8, True),
        (zone, "n1-highmem-8", "V100", 1, False),
        (zone, "n1-highmem-8", "V100", 1, True),
    ]
    assert [o.usd_per_h for o in offers] == pytest.approx([98.32, 30.5, 98.32, 25, 7.5, 3.0, 0.9])


def test_aws_zones_have_the_accounts_names(skypilot):
    """As SkyPilot has them: by ID in the list, and by name beside it, once it knows the account."""
    path = skypilot / "aws" / "vms.csv"
    path.write_text(path.read_text().replace("ap-south-1a", "aps1-az3").replace("-1b", "-az9"))

    def zones():
        return {o.zone for o in read_skypilot_folder(skypilot).offers if o.cloud == "aws"}

    assert zones() == {"aps1-az3", "ap-south-az9"}
    names = "AvailabilityZoneName,AvailabilityZone\nap-south-1b,aps1-az3\n"
    (skypilot / "aws" / "az_mappings-0123abcd.csv").write_text(names)
    assert zones() == {"ap-south-1b"}


def test_a_missing_column_and_a_negative_price_are_refused(skypilot):
    csv = skypilot / "aws/vms.csv"
    csv.write_text(AWS_ROWS.replace("SpotPrice", "Spot"))
    with pytest.raises(ConfigError, match="aws/vms.csv: has no column SpotPrice"):
        read_skypilot_folder(skypilot)
    csv.write_text(AWS_ROWS.replace("8.0", "2.5"))
    with pytest.raises(ConfigError, match="ap-south-1 p5.48xlarge: AcceleratorCount=2.5 is not"):
        read_skypilot_folder(skypilot)
    csv.write_text(AWS_ROWS.replace("30.5", "-30.5"))
    with pytest.raises(ConfigError, match=r"ap-south-1 p5.48xlarge: SpotPrice=-30.5 is not"):
        read_skypilot_folder(skypilot)
    with pytest.raises(ConfigError, match="has no <cloud>/vms.csv"):
        read_skypilot_folder(skypilot / "aws")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", r"aws/vms.csv: cannot be read \('utf-8' codec"),
        (AWS_ROWS.encode() + b"x" * 140_000, r"cannot be read \(field larger than"),
        (None, r"cannot be read \(.*Is a directory"),
    ],
)
def test_a_catalog_that_cannot_be_read(skypilot, content, said):
    path = skypilot / "aws/vms.csv"
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_skypilot_folder(skypilot)


def test_names_of_zones_without_their_columns(skypilot):
    (skypilot / "aws" / "az_mappings-0123abcd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="az_mappings-0123abcd.csv: has no column Availability"):
        read_skypilot_folder(skypilot)


def test_update_where_nothing_can_be_stored(skypilot, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPOTFORGE_CACHE", str(skypilot / "aws/vms.csv"))
    assert main(["catalog", "update", "--from", str(skypilot)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("SPOTFORGE_CACHE=") and err.count("\n") == 1


def test_update_stores_what_show_and_plan_then_use(skypilot, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPOTFORGE_CACHE", str(tmp_path / "cache"))
    assert main(["catalog", "update", "--from", str(skypilot)]) == 0
    assert "7 offers of 2 clouds" in capsys.readouterr().out
    assert main(["catalog", "show"]) == 0
    shown = capsys.readouterr().out
    assert "0 days old" in shown and "aws" in shown and "3 offers, 1 of them spot" in shown


def test_update_without_skypilot_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    assert main(["catalog", "update"]) == 2
    assert "sky show-gpus" in capsys.readouterr().err


def test_the_shipped_snapshot_is_dated_and_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("SPOTFORGE_CACHE", str(tmp_path))
    catalog = loaded()
    assert catalog.date == datetime.date(2026, 5, 24) and catalog.age_days == 8
    assert len(catalog.offers) > 400


def test_old_prices_are_refused_unless_told(monkeypatch, tmp_path):
    monkeypatch.setenv("SPOTFORGE_CACHE", str(tmp_path))
    later = datetime.date(2026, 7, 1)
    with pytest.raises(ConfigError, match="38 days old.*launch.max_price_age=38d"):
        loaded(date=later)
    assert loaded("launch.max_price_age=38d", date=later).age_days == 38


def test_prices_of_tomorrow_are_the_lists_mistake(tmp_path):
    path = tmp_path / "mine.json"
    write_snapshot(path, TODAY + datetime.timedelta(1), "test", [offer()])
    with pytest.raises(ConfigError, match=f"launch.catalog={path}: its prices are of 2026-06-02"):
        loaded(f"launch.catalog={path}")


def test_a_snapshot_comes_back_as_it_was(tmp_path):
    path = tmp_path / "snapshot-2026-06-01.json"
    pool = offer(cloud="", pool="lab", pool_kind="slurm", usd_per_h=0.0)
    offers = [offer(), offer(is_spot=True, zone="z", vcpus=8.0, max_nodes=1), pool]
    write_snapshot(path, TODAY, "test", offers)
    assert read_snapshot(path).offers == tuple(offers)
    row = json.loads(path.read_text())["offers"][-1]
    assert row["cloud"] == "slurm" and "pool_kind" not in row  # as files have it since the first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["offers"][0].pop("usd_per_h"), "offer 0: lacks .*usd_per_h"),
        (lambda c: c["offers"][0].update(usd_per_h=-1), "price=-1: .* must be above 0"),
        (lambda c: c["offers"][0].update(usd_per_h=0), "price=0: .* must be above 0"),
        (lambda c: c["offers"][0].update(usd_per_h=1e6), "price=.* and below 1,000,000"),
        (lambda c: c["offers"][0].update(usd_per_h=None), "usd_per_h=null"),
        (lambda c: c["offers"][0].update(gpus_per_node=2.5), "gpus_per_node=2.5"),
        (lambda c: c["offers"][0].update(max_nodes=0), "max_nodes=0: "),
        (lambda c: c["offers"][0].update(cloud=""), "cloud='': "),
        (lambda c: c["offers"][0].update(zone="a\x1b[2J"), r"zone='a\\x1b\[2J': "),
        (lambda c: c["offers"][0].update(country="india"), "country=india: "),
        (lambda c: c["offers"][0].update(usd_per_h="1"), "usd_per_h='1'"),
        (lambda c: c["offers"][0].update(colour="red"), "offer 0: .*unknown field colour"),
        (lambda c: c["offers"][0].update(gpu="H10O"), "gpu=H10O: .*did you mean.*H100"),
        (lambda c: c["offers"][0].update(is_spot=1), "is_spot=1 "),
        (lambda c: c.pop("date"), "`date`"),
        (lambda c: c.update(date="May"), "date='May'"),
        (lambda c: c.update(digest=5), "have the digest sha256:.*, not 5"),
    ],
)
def test_a_snapshot_with_something_wrong(tmp_path, change, said):
    path = tmp_path / "mine.json"
    write_snapshot(path, TODAY, "test", [offer()])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        read_snapshot(path)


def test_a_snapshot_that_is_no_json_file(tmp_path):
    deep, pipe = tmp_path / "deep.json", tmp_path / "pipe"
    deep.write_text("[" * 100_000)
    os.mkfifo(pipe)
    for path, said in (
        (deep, "is not JSON"),
        (pipe, "is not a file"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(ConfigError, match=f"launch.catalog={path}: {said}"):
            read_snapshot(path)


def test_a_price_that_was_changed_is_damage(tmp_path):
    path = tmp_path / "mine.json"
    write_snapshot(path, TODAY, "test", [offer(usd_per_h=20.0)])
    path.write_text(path.read_text().replace("20.0", "2.0"))
    with pytest.raises(DamagedError, match="digest"):
        read_snapshot(path)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launch.gpus=[H10]", r"launch.gpus=H10: .*did you mean.*H100"),
        ("launch.regions=[ap-soth-1]", r"no such region or group; did you mean.*ap-south-1"),
        ("launch.clouds=[aw]", r"launch.clouds=aw: no such cloud.*did you mean aws"),
        ("launch.discounts.asw=0.1", r"launch.discounts=asw: no such cloud"),
        ("launch.discounts={aws/sport:0.1}", r"launch.discounts=aws/sport: "),
        ("launch.quotas={asw/ap-south-1:8}", r"launch.quotas=asw/ap-south-1: no such cloud; did"),
        ("launch.quotas={a*/ap-soth-1:8}", r"no such region; did you mean.*ap-south-1"),
        ("launch.quotas={aws/*/H10:8}", r"no such GPU; did you mean.*H100"),
        ("launch.quotas={aws/*/*/sport:8}", r"no such kind; did you mean spot"),
        ("launch.preemption_hours={asw:3}", r"launch.preemption_hours=asw: no such cloud"),
        ("launch.preemption_hours={aws/us-esat-1:3}", r"no such region; did you mean.*us-east-1"),
        ("launch.data_region=aws/us-esat-1", r"no such region of aws; did you mean.*us-east-1"),
        ("launch.checkpoint_region=mars", r"launch.checkpoint_region=mars: no such cloud"),
        ("launch.result_region=//", r"launch.result_region=//: no such cloud; there are aws"),
        ("launch.countries={aws:uk}", r"launch.countries.aws=uk: "),
        (
            "launch.pools={a:{kind:ssh,gpu:L4,gpus_per_node:1,country:India}}",
            r"launch.pools.a.country=India: ",
        ),
    ],
)
def test_names_that_are_not_there(skypilot, word, said):
    os.utime(skypilot / "aws/vms.csv")
    with pytest.raises(ConfigError, match=said):
        loaded(f"launch.catalog={skypilot}", word, date=datetime.datetime.now(datetime.UTC).date())


def test_discounts_and_pools(skypilot):
    date = datetime.datetime.now(datetime.UTC).date()
    pool = "launch.pools={lab:{kind:slurm,gpu:a100-80gb,gpus_per_node:8,nodes:2,usd_per_h:3}}"
    words = [f"launch.catalog={skypilot}", "launch.discounts={aws:0.1,aws/spot:0.5}", pool]
    offers = loaded(*words, date=date).offers
    assert [o.usd_per_h for o in offers[:2]] == pytest.approx([88.488, 15.25])
    assert offers[-1].pool == "lab" and offers[-1].gpu == "A100-80GB" and offers[-1].max_nodes == 2


def test_quotas_take_the_smallest_that_fits():
    words = "launch.quotas={aws:64,aws/ap-south-1/H100/spot:16,aws/*/H100:32}"
    launch = compose_settings([words]).launch
    spot = offer(cloud="aws", region="ap-south-1", gpu="H100", is_spot=True)
    assert quota_of(launch, spot) == 16
    assert quota_of(launch, offer(cloud="aws", region="us-east-1", gpu="H100")) == 32
    assert quota_of(launch, offer(cloud="aws", region="us-east-1", gpu="L4")) == 64
    assert quota_of(launch, offer(cloud="gcp")) is None


@pytest.mark.parametrize(
    ("place", "is_in"),
    [
        (("aws", "ap-south-1"), True),
        (("aws", "ap-south-2"), True),
        (("gcp", "asia-south1"), True),
        (("gcp", "asia-south2"), True),
        (("azure", "centralindia"), True),
        (("gcp", "asia-southeast1"), False),
        (("lambda", ""), False),  # nobody knows where
    ],
)
def test_residency(place, is_in):
    refusal = residency_refusal(offer(cloud=place[0], region=place[1]), ["india"])
    assert (refusal is None) == is_in


def test_a_provider_that_the_user_vouches_for():
    for code in ("in", "IN"):
        words = [f"launch.countries={{jarvis-labs:{code}}}", "launch.regions=[india]"]
        offers = loaded(*words, "launch.data_region=jarvis-labs").offers
        passed = {o.cloud for o in offers if residency_refusal(o, ["india"]) is None}
        assert passed == {"jarvis-labs"}


def test_egress_is_free_within_a_region_and_never_cheaper_for_more():
    assert egress_usd("aws/ap-south-1", "aws/ap-south-1", 1e5) == 0
    assert egress_usd("aws/ap-south-1", "aws/us-east-1", 10_000) == pytest.approx(860)
    rng = random.Random(0)
    places = ["aws/us-east-1", "aws/ap-south-1", "gcp/asia-south1", "azure/centralindia", "lambda/"]
    for _ in range(2000):
        source, destination = rng.choice(places), rng.choice(places)
        less, more = sorted(rng.uniform(0, 2e5) for _ in range(2))
        low, high = (egress_usd(source, destination, gb) for gb in (less, more))
        assert 0 <= low <= high


@pytest.mark.parametrize(
    ("written", "size", "name"),
    [
        ("NVIDIA A100 SXM4 80GB", None, "A100-80GB"),
        ("A100 (40 GB)", None, "A100"),
        ("NVIDIA H100 PCIe", 80, "H100-PCIE"),
        ("NVIDIA HGX H200", 141, "H200"),
        ("RTX 4090 (48 GB mod)", None, None),
        ("NVIDIA L40", 40, None),
        ("a10g", None, "A10G"),
    ],
)
def test_names_of_gpus_as_others_write_them(written, size, name):
    assert gpu_of(written, size) == name


def test_names_are_taken_in_any_case():
    assert known_gpu("a100-80gb") == "A100-80GB"


def test_five_times_as_many_offers_are_read_in_about_five_times_the_time(tmp_path):
    def seconds(count):
        path = tmp_path / f"{count}.json"
        write_snapshot(path, TODAY, "test", [offer(zone=f"z{i}") for i in range(count)])
        times = []
        for _ in range(3):
            begin = time.process_time()
            assert len(read_snapshot(path).offers) == count
            times.append(time.process_time() - begin)
        return min(times)

    assert seconds(5000) < 15 * seconds(1000)  # what grows with the square would take 25 times
