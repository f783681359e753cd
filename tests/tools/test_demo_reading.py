# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""The answers that the text encoders are taught agree with the captions."""

from svdq_cli.demo.world import OBJECT_COLORS, SHAPES, Scene, Thing, caption_of, sample_captions
from tools.train_demo.reading import SPOTS, UNASKED, spot_answers, token_answers
from tools.train_demo.text import new_clip_tokenizer, new_t5_tokenizer, token_ids, tokenize

SCENE = Scene((Thing("small", "red", "circle"), Thing("large", "blue", "star")), "right of", "white")


def test_the_tokens_of_a_phrase_know_their_thing_and_where_it_is():
    words = caption_of(SCENE, long=True).split()
    answers = token_answers(SCENE, long=True, length=20)
    for word, answer in zip(words, answers, strict=False):
        if word in ("red", "circle"):
            assert answer[:2] == [SPOTS.index("right"), OBJECT_COLORS.index("red")]
        if word in ("blue", "star"):
            assert answer[:2] == [SPOTS.index("left"), OBJECT_COLORS.index("blue")]
        if word in ("to", "of", "on", "background"):
            assert set(answer) == {UNASKED}


def test_every_spot_without_a_thing_is_left_unasked():
    answers = spot_answers(SCENE)
    assert answers[SPOTS.index("left")][1] == SHAPES.index("star")
    assert [spot for spot, answer in zip(SPOTS, answers, strict=True) if UNASKED not in answer] == [
        "left",
        "right",
    ]


def test_every_word_is_one_token_in_both_tokenizers():
    captions = sample_captions(50, held_out=False, seed=1)
    clip, t5 = new_clip_tokenizer(), new_t5_tokenizer()
    for caption in captions:
        count = len(caption.split())
        assert len(t5(caption).input_ids) == count + 1
        assert len(clip(caption).input_ids) == count + 2


def test_padding_is_what_the_pipeline_adds():
    captions = tokenize(new_clip_tokenizer(), new_t5_tokenizer(), (SCENE,))
    _, ids = captions.batch(captions.t5.new_tensor([0, 2]), length=32)
    texts = [caption_of(SCENE), ""]
    assert ids.equal(token_ids(new_t5_tokenizer(), texts, length=32))
