"""The search for neighbours against the bare product, and databases on disk."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ldm_jax.conditioning.neighbors import Index, open_database
from ldm_jax.data.embeddings import (
    EmbeddingInfo,
    Embeddings,
    begin_embeddings,
    read_embeddings,
    write_embeddings,
)
from ldm_jax.errors import DataError

pytestmark = pytest.mark.fast
RNG = np.random.default_rng(0)


def brute_force(vectors, queries, k):
    unit, asked = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (vectors, queries))
    return np.argsort(-asked @ unit.T, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("n", "k"), [(5, 5), (1000, 3), (9000, 10)])
def test_the_search_is_that_of_the_whole_product(devices, n, k):
    vectors, queries = RNG.standard_normal((n, 12)), RNG.standard_normal((19, 12))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    found = Index(vectors, mesh).search(queries, k)
    assert (found.rows == brute_force(vectors, queries, k)).all()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(found.vectors, unit[found.rows], atol=1e-6)
    assert (np.diff(found.scores) <= 0).all()
    squared = Index(vectors, mesh, metric="squared_l2").search(queries, k)
    assert (squared.rows == found.rows).all()


def test_of_equal_scores_the_first_rows_come_first():
    # Four directions, each many times, so that blocks and devices tie.
    vectors = np.tile(np.eye(4, dtype=np.float32), (3000, 1))
    found = Index(vectors).search(np.eye(4)[[2]], 7)
    assert found.rows.tolist() == [[2, 6, 10, 14, 18, 22, 26]]


def test_an_approximate_search_reaches_its_recall():
    vectors, queries = RNG.standard_normal((5000, 8)), RNG.standard_normal((16, 8))
    found = Index(vectors, recall=0.9).search(queries, 10).rows
    wanted = brute_force(vectors, queries, 10)
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, wanted, strict=True)]) >= 0.9


def test_what_cannot_be_searched_is_named():
    index = Index(np.eye(3))
    for call, message in (
        (lambda: index.search(np.ones((1, 3)), 4), "4 neighbours of a database of 3 vectors"),
        (lambda: index.search(np.ones((1, 2)), 1), "the database has vectors of 3 numbers"),
        (lambda: index.search(np.zeros((1, 3)), 1), "vector 0 is zero or not finite"),
        (lambda: Index(np.array([[1.0], [np.nan]])), "vector 1 is zero or not finite"),
        (lambda: Index(np.eye(3), metric="dot"), "metric 'dot' does not exist"),
        (lambda: Index(np.eye(3), recall=0), "recall is 0"),
        (lambda: Index(np.ones(3)), "a database of the shape"),
    ):
        with pytest.raises(DataError, match=message):
            call()


def test_files_of_the_original_are_joined(tmp_path):
    parts = [RNG.standard_normal((n, 4)).astype(np.float32) for n in (3, 2)]
    for i, part in enumerate(parts):
        names = np.array([f"picture{i}{j}" for j in range(len(part))])
        coords = np.arange(4 * len(part)).reshape(-1, 4)
        path = tmp_path / f"part_{i}.npz"
        np.savez(path, embedding=part, img_id=names, patch_coords=coords)
    found = read_embeddings(tmp_path)
    assert found.names.tolist() == ["picture00", "picture01", "picture02", "picture10", "picture11"]
    assert found.coords is not None
    assert found.coords.shape == (5, 4)
    np.testing.assert_array_equal(found.vectors, np.concatenate(parts))

    database = open_database(tmp_path)
    assert database is open_database(tmp_path)  # kept
    rows = database.index.search(parts[1], 1).rows[:, 0]
    assert rows.tolist() == [3, 4]
    # Vectors of the own picture are left out, the others keep their order.
    nearest = brute_force(found.vectors, parts[0][:1], 5)[0]
    others = database.others(parts[0][:1], 2, ["picture00"])
    unit = found.vectors / np.linalg.norm(found.vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(others[0], unit[[r for r in nearest if r != 0][:2]], atol=1e-6)
    with pytest.raises(DataError, match="fewer than 5 vectors of other pictures"):
        database.others(parts[0][:1], 5, ["picture00"])

    np.savez(tmp_path / "part_2.npz", embedding=np.ones((1, 5), np.float32))
    with pytest.raises(DataError, match=r"part_2.npz has vectors of 5 numbers, .* of 4"):
        open_database(tmp_path)  # its files have changed


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"vectors": np.ones((1, 2))}, "has no array 'embedding'"),
        ({"embedding": np.ones((1, 2), int)}, "not floats"),
        ({"embedding": np.ones((2, 2)), "img_id": np.array(["a"])}, "1 rows of 'img_id', 2 of"),
        ({"embedding": np.array([{}])}, "is no .npz file of arrays"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_embeddings(tmp_path / "x.npz")


def test_a_folder_of_shards_is_whole_or_refused(tmp_path):
    info = EmbeddingInfo({"data sha256": "x"}, dim=2, count=3, shard_size=2)
    folder = tmp_path / "database"
    with pytest.raises(DataError, match="is no database of embeddings"):
        read_embeddings(folder)
    begin_embeddings(folder, info)
    begin_embeddings(folder, info)  # resumes
    names = [name for name, _ in info.shards()]
    for name, rows in zip(names, (2, 1), strict=True):
        with pytest.raises(DataError, match=r"is not whole: \d of 2 shards are missing"):
            read_embeddings(folder)
        array = np.ones((rows, 2), np.float32)
        parts = Embeddings(array, np.array(["a"] * rows), np.zeros((rows, 4), np.int64))
        write_embeddings(folder / name, parts)
    assert read_embeddings(folder).vectors.shape == (3, 2)
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:40])
    with pytest.raises(DataError, match="1 of 2 shards are missing"):
        read_embeddings(folder)
    other = EmbeddingInfo({"data sha256": "y"}, dim=2, count=3, shard_size=2)
    with pytest.raises(DataError, match="was begun with another data"):
        begin_embeddings(folder, other)
    with pytest.raises(DataError, match="is not empty and holds no embeddings"):
        begin_embeddings(tmp_path, info)
