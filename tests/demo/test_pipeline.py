"""The embedded folder is a plain FluxPipeline that draws its captions."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
import pytest
import torch
from diffusers import FluxPipeline

from svdq_cli.demo.outliers import export_demo
from svdq_cli.demo.world import parse_caption, sample_captions
from svdq_cli.errors import UsageError
from tools.train_demo.accuracy import MODEL, TEXT_LENGTH, generate_images
from tools.train_demo.judge import judge


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_folder_stays_small():
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 19_000_000


def test_the_folder_holds_no_pickle():
    assert not [
        file for file in MODEL.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt", ".msgpack")
    ]


def test_the_transformer_is_flux_with_both_kinds_of_block(pipeline):
    assert type(pipeline.transformer).__name__ == "FluxTransformer2DModel"
    assert len(pipeline.transformer.transformer_blocks)
    assert len(pipeline.transformer.single_transformer_blocks)


def test_every_block_linear_has_both_sizes_in_multiples_of_128(pipeline):
    blocks = [*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks]
    linears = [part for block in blocks for part in block.modules() if isinstance(part, torch.nn.Linear)]
    assert linears
    assert all(size % 128 == 0 for linear in linears for size in linear.weight.shape)


def test_held_out_captions_are_drawn_as_they_say(pipeline):
    captions = sample_captions(8, held_out=True, seed=11)
    images = generate_images(pipeline, captions)
    right = sum(
        judge(image, parse_caption(caption)).objects_and_colors
        for image, caption in zip(images, captions, strict=True)
    )
    assert right >= 6  # of 8; the model card gives the share over 200


def test_the_same_seed_generates_the_same_image_in_any_batch(pipeline):
    captions = sample_captions(3, held_out=True, seed=12)
    together, alone = (
        generate_images(pipeline, captions, steps=4),
        generate_images(pipeline, captions, steps=4, batch=1),
    )
    for first, second in zip(together, alone, strict=True):
        # sums in another order: at most a rounding step of a pixel
        assert max(high for _, high in _difference(first, second)) <= 2


def _difference(first, second):
    from PIL import ImageChops

    return ImageChops.difference(first, second).getextrema()


def test_any_text_and_the_default_length_generate_an_image(pipeline):
    texts = ["", "Zwölf Boxkämpfer! 猫 #42", "a small red circle in the center on white"]
    images = pipeline(texts, height=96, width=96, num_inference_steps=1).images
    assert [image.size for image in images] == [(96, 96)] * 3


def test_the_padding_of_a_tokenized_caption_is_what_training_saw(pipeline):
    ids = pipeline.tokenizer_2("a red star", padding="max_length", max_length=TEXT_LENGTH).input_ids
    assert len(ids) == TEXT_LENGTH
    assert ids[3] == pipeline.tokenizer_2.eos_token_id
    assert set(ids[4:]) == {0}


def test_the_exported_copy_is_the_embedded_model(tmp_path):
    folder = export_demo(tmp_path / "demo", outliers=False)
    names = sorted(file.relative_to(MODEL) for file in MODEL.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert all((MODEL / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_export_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        export_demo(tmp_path, outliers=True)
