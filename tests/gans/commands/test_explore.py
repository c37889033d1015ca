"""The page of explore: as a program sees it, and in a browser. Without Gradio only what the command refuses."""

from __future__ import annotations

import shutil
import socket
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gans.commands
from gans.commands.cli import main
from gans.commands.explorer import Explorer
from gans.models.fastgan import FastGANGeneratorConfig
from gans.recipes.registry import build
from gans.training.loop import train
from tests.gans.attending_generators import GENERATORS

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
ALONE = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SETTINGS = [3, 0.5, "bee", "one seed", 1, 0.5, "z", []]


def test_what_is_refused(monkeypatch, capsys, tmp_path):
    arguments = ["explore", "--checkpoint", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*arguments, "--port", "70000"])
    assert "port is 70000; it must be from 1 to 65535" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "gans.commands.explore_page", raising=False)
    monkeypatch.delattr(gans.commands, "explore_page", raising=False)
    assert main(arguments) == 1
    assert capsys.readouterr().err == "error: explore needs gradio, which is not installed: pip install '.[explore]'\n"


@pytest.fixture(scope="module")
def gradio():
    return pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def serve(gradio):
    """Serves a generator and returns the address of the page. No other machine may be asked for anything."""
    from gans.commands.explore_page import make_page, serve

    pages = []

    def start(config):
        torch.manual_seed(0)
        generator = build(config).eval()
        generator.class_names = ["ant", "bee", "cat"] if getattr(config, "classes", 0) else []
        pages.append(make_page(Explorer(generator), "a generator"))
        return serve(pages[-1], port=None)

    with pytest.MonkeyPatch.context() as patch:
        look_up = socket.getaddrinfo

        def local(host, *rest, **options):
            assert host in ("127.0.0.1", "localhost", None), host
            return look_up(host, *rest, **options)

        patch.setattr(socket, "getaddrinfo", local)
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        yield start
    for page in pages:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def styles(serve):
    return serve(replace(GENERATORS["stylenat"], classes=3))


def test_as_a_program_sees_it(styles):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    assert styles.startswith("http://127.0.0.1:")
    client = Client(styles, verbose=False)

    def show(*settings, pixel=(6, 9), every_module=False):
        picture, between, maps = client.predict(*settings, *pixel, every_module, api_name="/show")
        return Path(picture).read_bytes(), between, maps

    one, between, maps = show(*SETTINGS)
    assert between == "" and maps.count("<img") == 2 + 4 + 3 and "8x8" in maps
    assert show(*SETTINGS, pixel=(2, 9))[2] != maps
    assert show(*SETTINGS, every_module=True)[2].count("<img") == 2 * 9
    other, between, _ = show(3, 0.5, "cat", "mix styles", 1, 0.5, "z", ["0: 4x4", "5: 16x16"])
    assert other != one and between.count("<img") == 1
    assert show(3, 1.0, "", "interpolate", 1, 0.5, "w", [])[1].count("<img") == 1
    with pytest.raises(AppError, match="second seed is None; it must be a whole number from 0 on"):
        show(3, 1.0, "", "interpolate", None, 0.5, "z", [])


def test_in_a_browser(styles):
    if BROWSER is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=BROWSER, args=ALONE)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(styles)
        sample = page.locator(".sample img")
        page.locator("table.looks img").nth(8).wait_for()
        before = page.locator("table.looks").inner_html()
        box = sample.bounding_box()
        page.mouse.click(box["x"] + box["width"] * 3.5 / 16, box["y"] + box["height"] * 9.5 / 16)
        page.wait_for_function("html => document.querySelector('table.looks').innerHTML != html", arg=before)
        assert page.get_by_label("Row of the pixel").input_value() == "9"
        assert page.get_by_label("Column of the pixel").input_value() == "3"
        page.get_by_label("mix styles").check()
        page.get_by_label("0: 4x4").check()
        page.locator("img.between").wait_for()
        assert page.get_by_label("Way to the second seed").count() == 0
        browser.close()
    assert asked and all(url.startswith((styles, "data:", "blob:")) for url in asked)


def test_a_generator_without_attention_or_mapping(serve):
    with urllib.request.urlopen(serve(FastGANGeneratorConfig(latent_dim=8, image_size=32, width=8))) as page:
        text = page.read().decode()
    assert "This generator has no attention that can be drawn." in text and "mix styles" not in text


def test_command(gradio, tiny, tiny_run, monkeypatch, capsys):
    from gradio_client import Client

    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: None)
    train(tiny, tiny_run, progress=False)
    command = ["explore", "--checkpoint", tiny_run.out, "--no-browser", "--backend", "reference"]
    assert main(command) == 0
    address = capsys.readouterr().out.splitlines()[-1].split()[0]
    port = address.rstrip("/").rpartition(":")[2]
    assert main([*command, "--port", port]) == 1
    assert capsys.readouterr().err.startswith(f"error: port {port} of 127.0.0.1 is taken")
    result = Client(address, verbose=False).predict(
        0, 1, "", "one seed", 1, 0.5, "z", [], 0, 7, False, api_name="/show"
    )
    assert result[2].count("<img") == 4
    gradio.close_all(verbose=False)
