"""Device profiles: what is written is read; what is damaged is named; what is predicted follows the stated line."""

import copy
import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import made_up_profile, profile_data

from elastic_sparsity import ElasticCheckpoint, ElasticModel
from elastic_sparsity.device_profile import (
    Profile,
    fit_way,
    predict,
    predict_fastest,
    profile_path,
    read_profile,
    write_profile,
)
from elastic_sparsity.errors import ElasticSparsityError, LevelError, ProfileError
from elastic_sparsity.ways import Way, linear_bytes, streamed_bytes

SHIPPED = ["gpu-datacenter", "laptop-avx2", "phone", "server-amx", "server-avx512"]
ROWS = [("some-checkpoint", "0.5", "dense-float32", 10.0), ("some-checkpoint", "0.5", "packed-float32", 6.0)]


def written(folder, data):
    path = folder / "profile.json"
    path.write_text(json.dumps(data))
    return path


def test_round_trip(tmp_path):
    profile = made_up_profile(ROWS)
    write_profile(profile, tmp_path / "new" / "profile.json")
    assert read_profile(tmp_path / "new" / "profile.json") == profile


def test_later_fields_are_ignored(tmp_path):
    data = profile_data(ROWS)
    data["later"] = data["device"]["later"] = {"x": 1}
    assert read_profile(written(tmp_path, data)) == made_up_profile(ROWS)


def broken(change):
    data = profile_data(ROWS)
    change(data)
    return data


BROKEN = {
    "no device profile": (lambda d: d.update(format="x"), "not a device profile"),
    "version": (lambda d: d.update(format_version=2), "format version 2; this release reads 1"),
    "no way": (lambda d: d.update(ways={}), "field ways: "),
    "missing": (lambda d: d["device"].pop("threads"), "field device.threads: Field required"),
    "text for a number": (lambda d: d["ways"]["dense-float32"].update(bytes_per_s="9"), "ways.dense-float32.bytes_per"),
    "no bandwidth": (lambda d: d["ways"]["dense-float32"].update(bytes_per_s=0.0), "greater than 0"),
    "negative": (lambda d: d["measurements"][0]["decode"][0].update(step_s=-1.0), r"measurements.0.decode.0.step_s"),
    "too large": (lambda d: d["measurements"][0].update(disk_bytes=10**400), "disk_bytes"),
    "NaN": (lambda d: d["ways"]["dense-float32"].update(overhead_s=float("nan")), "overhead_s"),
    "runtime": (lambda d: d["ways"]["dense-float32"].update(runtime="magic"), "'dense', 'packed' or"),
    "misnamed way": (lambda d: d["ways"].update(x=d["ways"]["dense-float32"]), "make it dense-float32"),
    "unknown way": (lambda d: d["measurements"][0].update(way="dense-int8"), "'dense-int8', which is not under ways"),
    "estimate that measured": (lambda d: d.update(kind="estimate"), "an estimate has no measurements"),
    "measured nothing": (lambda d: d.update(measurements=[]), "an estimate has no measurements"),
    "terminal codes": (lambda d: d.update(name="\x1b[2J"), "field name: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_named(name, tmp_path):
    change, message = BROKEN[name]
    path = written(tmp_path, broken(change))
    with pytest.raises(ProfileError, match=message) as caught:
        read_profile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 1' + b"0" * 5000 + b"}"]
)
def test_no_profile_at_all(content, tmp_path):
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(ProfileError, match=r"p\.json: (cannot be read|not a device profile)"):
        read_profile(tmp_path / "p.json")


def test_a_file_too_large_is_not_read(tmp_path):
    with (tmp_path / "p.json").open("wb") as file:
        file.truncate(16_000_001)
    with pytest.raises(ProfileError, match="at most 16000000 are read"):
        read_profile(tmp_path / "p.json")


def places(data, at=()):
    """Paths of all values in JSON."""
    yield at
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


PLACES = [at for at in places(profile_data(ROWS)) if at]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.sampled_from(PLACES), value=JSON)
def test_any_other_value_is_an_error_of_ours_or_a_whole_profile(at, value, tmp_path):
    data = copy.deepcopy(profile_data(ROWS))
    holder = data
    for key in at[:-1]:
        holder = holder[key]
    holder[at[-1]] = value
    try:
        profile = read_profile(written(tmp_path, data))
    except ElasticSparsityError as error:
        assert isinstance(error, ProfileError)
    else:
        assert Profile.model_validate(json.loads(json.dumps(profile.model_dump()))) == profile


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_are_estimates_with_a_source(name):
    profile = read_profile(name)
    assert profile.name == name and profile.is_estimate
    assert len(profile.source) > 200 and "not measured" in profile.source
    assert all(entry.fit_error is None for entry in profile.ways.values())


def test_the_shipped_ones_are_these_and_listed():
    assert sorted(path.stem for path in profile_path("phone").parent.iterdir()) == SHIPPED
    with pytest.raises(ProfileError, match=f"'tablet': no such file; profiles of the package: {', '.join(SHIPPED)}"):
        read_profile("tablet")
    for name in ("../profiles/phone", "phone.json", ""):
        with pytest.raises(ProfileError, match="no such file"):
            read_profile(name)


def test_a_file_comes_before_a_shipped_profile(tmp_path, monkeypatch):
    write_profile(made_up_profile(ROWS), tmp_path / "phone")
    monkeypatch.chdir(tmp_path)
    assert read_profile("phone").name == "made up"


def test_bytes_a_token_reads(tiny_checkpoint):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    spec = checkpoint.linears["model.layers.0.mlp.up_proj"]  # 64 x 32
    half, pattern = checkpoint.find(0.5), checkpoint.find("2:4")
    found = {
        (way, level.name): linear_bytes(spec, level, Way(runtime=way[0], dtype=way[1]))
        for way in (
            ("dense", "bfloat16"),
            ("packed", "bfloat16"),
            ("packed", "float32"),
            ("semi_structured", "float16"),
        )
        for level in (half, pattern)
    }
    assert found[("dense", "bfloat16"), "0.5"] == found[("dense", "bfloat16"), "2:4"] == 64 * 32 * 2
    for (way, level), count in found.items():
        if way[0] == "packed":
            model = ElasticModel.from_pretrained(tiny_checkpoint, level, runtime="packed", dtype=way[1])
            assert model.model.layers[0].mlp.up_proj.packed.num_bytes == count
    assert found[("semi_structured", "float16"), "2:4"] == 64 * 32 * (1 + 1 / 8)
    model_bytes = (2 * 260 * 32 + 5 * 32) * 4 + sum(x.size for x in checkpoint.linears.values()) * 4
    dense = streamed_bytes(checkpoint, half, Way(runtime="dense", dtype="float32"))
    assert model_bytes <= dense <= model_bytes + 2000, "all weights, and the header of one file"


def test_a_way_serves_a_level_or_not(tiny_checkpoint):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    way = Way(runtime="semi_structured", dtype="float16")
    assert [level.name for level in checkpoint.ladder.levels if way.serves(level)] == ["2:4"]
    profile = made_up_profile([], kind="estimate", ways=[("semi_structured", "float16")])
    with pytest.raises(LevelError, match=r"none of its ways \(semi_structured-float16\) runs 50 %"):
        predict_fastest(profile, checkpoint, checkpoint.find(0.5))
    assert predict_fastest(profile, checkpoint, checkpoint.find("2:4")).way == way


def test_measured_is_taken_as_it_is_and_else_the_line(tiny_checkpoint):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    level, mine = checkpoint.find(0.5), checkpoint.manifest.checkpoint_id
    line = 1000 * (14 * 1e-4 + streamed_bytes(checkpoint, level, Way(runtime="dense", dtype="float32")) / 1e8)

    found = predict(made_up_profile([(mine, "0.5", "dense-float32", 7.5)]), checkpoint, level, "dense-float32")
    assert (found.ms_per_token, found.how) == (pytest.approx(7.5), "measured")
    for other in [("another-one", "0.5", "dense-float32", 7.5), (mine, "0.6", "dense-float32", 7.5)]:
        found = predict(made_up_profile([other]), checkpoint, level, "dense-float32")
        assert (found.ms_per_token, found.how) == (pytest.approx(line), "predicted")
    found = predict(made_up_profile([], kind="estimate"), checkpoint, level, "dense-float32")
    assert (found.ms_per_token, found.how) == (pytest.approx(line), "estimate")
    assert found.how_text == "estimate, not measured"


DENSE = Way(runtime="dense", dtype="float32")


def test_a_line_is_found_again():
    shapes = [(x, 2e-6 + x / 5e9) for x in (1000, 50_000, 400_000)]
    whole = [(100, 20_000_000, 100 * 3e-5 + 20_000_000 / 5e9), (100, 9_000_000, 100 * 3e-5 + 9_000_000 / 5e9)]
    entry = fit_way(DENSE, whole, shapes)
    assert entry.bytes_per_s == pytest.approx(5e9)
    assert entry.overhead_s == pytest.approx(3e-5)
    assert entry.fit_error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "shapes",
    [[], [(1000, 1e-6)], [(1000, 2e-6), (5000, 1e-6)], [(1000, 0.0), (2000, 1.0)]],
    ids=["none", "one size", "falling", "steeper than the whole"],
)
def test_without_a_usable_slope_all_time_is_on_the_bytes(shapes):
    entry = fit_way(DENSE, [(10, 1_000_000, 2e-3)], shapes)
    assert (entry.overhead_s, entry.bytes_per_s) == (0.0, pytest.approx(5e8))


def test_the_largest_error_is_told():
    entry = fit_way(DENSE, [(10, 1000, 1.0), (10, 1000, 1.0), (10, 1000, 2.0)], [])
    assert entry.fit_error == pytest.approx(0.5)
