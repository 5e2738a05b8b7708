"""Images in every form that rows hold them in, and what is wrong with those that are refused."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.vlm import chat, encoded, picture
from unsloth.runtime.data import DataError, load_data, preview
from unsloth.runtime.images import ImageRules, fitted_size, open_image, size_of, stored
from unsloth.runtime.problems import BadRow

PNG = encoded(picture())
SIXTEEN = Image.fromarray(np.full((4, 4), 257 * 40, dtype=np.uint16))


@pytest.mark.parametrize(
    "value",
    [
        picture(),
        PNG,
        {"bytes": PNG, "path": None},
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()},
        "a.png",
        {"bytes": None, "path": "a.png"},
        Path("a.png"),
    ],
)
def test_forms(value, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    rules = ImageRules(folder=tmp_path)
    held = stored(value, rules)
    assert bool(held["bytes"]) != bool(held["path"])
    for form in (value, held):
        image = open_image(form, rules)
        assert image.mode == "RGB" and image.size == (40, 24) and image.getpixel((3, 3)) == (255, 0, 0)
    assert size_of(held, rules) == (40, 24)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "is null"),
        ("", "is null"),
        (3, "the number 3 is no image"),
        (b"", "no bytes"),
        (b"GIF89a and nothing else", "no image that can be read, or is damaged"),
        (PNG[:-30], "damaged"),
        (encoded(picture(size=(64, 64)), "JPEG")[:-200], "damaged"),
        ("none.png", "there is no image .*none.png"),
        ("https://example.org/a.png", "which is not fetched unless allow_image_urls"),
        ("data:image/png;base64,????", "no base64"),
        (encoded(picture(), "GIF", save_all=True, append_images=[picture("blue")]), "2 frames; convert_images"),
        (encoded(picture(0, mode="CMYK"), "JPEG"), "in CMYK"),
        (encoded(SIXTEEN), "16 bits"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    ],
)
def test_what_is_refused(value, reason):
    for use in (stored, open_image):
        with pytest.raises(BadRow, match=reason):
            use(value, ImageRules())


def test_what_may_be_converted():
    rules = ImageRules(convert=True)
    moving = encoded(picture(), "GIF", save_all=True, append_images=[picture("blue")])
    assert open_image(moving, rules).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(encoded(picture(0, mode="CMYK"), "JPEG"), rules).mode == "RGB"
    assert open_image(encoded(SIXTEEN), rules).getpixel((0, 0)) == (40, 40, 40)
    assert stored(picture(0, mode="CMYK"), rules)["bytes"].startswith(b"\x89PNG")


def test_transparency_is_white_and_photographs_stand_upright():
    assert open_image(picture((255, 0, 0, 0), mode="RGBA"), ImageRules()).getpixel((0, 0)) == (255, 255, 255)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    turned = encoded(picture(size=(40, 24)), "JPEG", exif=sideways)
    assert open_image(turned, ImageRules()).size == size_of(turned, ImageRules()) == (24, 40)


def test_images_are_reduced_and_never_enlarged():
    assert fitted_size(4000, 1000, ImageRules(resize=400)) == (400, 100)
    assert fitted_size(4000, 1000, ImageRules(resize=(2000, 100))) == (400, 100)
    assert fitted_size(40, 24, ImageRules(resize=400)) == (40, 24)
    assert open_image(picture(), ImageRules(resize=20)).size == (20, 12)


def test_urls_are_fetched_where_that_is_allowed():
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(PNG if self.path == "/a.png" else b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = f"http://127.0.0.1:{server.server_port}"
        assert stored(f"{place}/a.png", ImageRules(urls=True)) == {"bytes": PNG, "path": ""}
        with pytest.raises(BadRow, match="cannot be fetched"):
            stored(f"{place}/b.png", ImageRules(urls=True))
    finally:
        server.shutdown()


# -- data sets ---------------------------------------------------------------------------------------------------------


def table(folder: Path, text: str, name: str = "metadata.csv") -> str:
    (folder / name).write_text(text)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(PNG)
    return str(folder)


def test_a_folder_with_a_table(tmp_path):
    found = load_data(table(tmp_path, "file_name,question,answer\n0.png,What?,red\n1.png,And?,blue\nx.png,No?,no\n"))
    assert found.has_images and "an image, a question and its answer" in str(found)
    assert found.problems.lines == [f"{tmp_path}/metadata.csv:4: there is no image {tmp_path}/x.png"]
    row = found.rows[0]
    assert row["prompt"][0]["content"] == [{"type": "image", "text": ""}, {"type": "text", "text": "What?"}]
    assert row["completion"] == [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    assert row["images"] == [{"bytes": b"", "path": str(tmp_path / "0.png")}]
    with pytest.raises(DataError, match=r"strict_data.*\n.*metadata.csv:4"):
        load_data(str(tmp_path), strict=True)


def test_an_image_and_its_text(tmp_path):
    found = load_data(table(tmp_path, "file_name,text\n0.png,red\n1.png,\n"))
    assert len(found.rows) == 1 and "metadata.csv:3: column 'text' is empty" in str(found)
    assert found.rows[0]["prompt"][0]["content"] == [{"type": "image", "text": ""}]
    (tmp_path / "metadata.csv").write_text("image,label\n0.png,\n2.png,7\n")
    found = load_data(str(tmp_path))
    assert "an image with no text" in str(found) and found.rows[0]["completion"][0]["content"][0]["text"] == "7"


def test_a_folder_without_a_table(tmp_path):
    with pytest.raises(DataError, match=r"a metadata\.csv in it, with the columns file_name"):
        load_data(str(tmp_path))
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("file_name,text\n")
    with pytest.raises(DataError, match=r"a\.csv, b\.csv: name the one"):
        load_data(str(tmp_path))


def test_parquet_with_bytes(tmp_path):
    images = [{"bytes": PNG, "path": None}, {"bytes": PNG[:40], "path": None}, None]
    rows = {"image": images, "question": ["a"] * 3, "answer": ["b"] * 3}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    found = load_data(str(tmp_path / "a.parquet"))
    assert len(found.rows) == 2 and found.problems.lines[0].startswith(f"{tmp_path}/a.parquet:2: ")
    assert found.rows[0]["images"] == [{"bytes": PNG, "path": ""}] and found.rows[1]["images"] == []


def test_chats_in_json_lines(tmp_path):
    table(tmp_path, "")
    openai = [{"type": "image_url", "image_url": {"url": "1.png"}}, {"type": "text", "text": "And?"}]
    rows = [
        chat("0.png", "Which of them", "2.png"),
        {"messages": [{"role": "user", "content": openai}, {"role": "assistant", "content": "red"}]},
        {
            "conversations": None,
            "messages": [{"from": "human", "value": "Look: <image> !"}, {"from": "gpt", "value": "red"}],
            "images": ["0.png"],
        },
        chat("no image at all"),
        chat("0.png", "<image>"),
        {"messages": [{"role": "user", "content": "<image> and <image>"}], "images": ["0.png"]},
        {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_data(str(tmp_path / "a.jsonl"))
    assert [len(row["images"]) for row in found.rows] == [2, 1, 1, 0]
    assert [part["type"] for part in found.rows[0]["messages"][0]["content"]] == ["image", "text", "image"]
    assert [part["type"] for part in found.rows[2]["messages"][0]["content"]] == ["text", "image", "text"]
    reasons = "\n".join(found.problems.lines)
    assert "jsonl:5: the messages have 2 places for images (<image>), and there are 1 images" in reasons
    assert "jsonl:6: no message is the assistant's" in reasons and "jsonl:7: a message holds a part that is" in reasons
    assert preview(str(tmp_path / "a.jsonl")).problems.count == 3


def test_texts_are_no_images(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a poem about seas", "question": "a", "answer": "b"}')
    assert not load_data(str(tmp_path / "a.jsonl")).has_images
