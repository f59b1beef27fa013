"""Passages of English books, all in the public domain, to be spoken to a speech recognizer."""

__all__ = ["CALIBRATION", "TEST"]

CALIBRATION = (
    # Herman Melville, Moby-Dick.
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in "
    "my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world.",
    # Henry David Thoreau, Walden.
    "I went to the woods because I wished to live deliberately, to front only the essential facts "
    "of life, and see if I could not learn what it had to teach, and not, when I came to die, "
    "discover that I had not lived.",
    # James Matthew Barrie, Peter and Wendy.
    "All children, except one, grow up. They soon know that they will grow up, and the way Wendy "
    "knew was this. One day when she was two years old she was playing in a garden, and she "
    "plucked another flower and ran with it to her mother.",
    # Mark Twain, Adventures of Huckleberry Finn.
    "It was a close place. I took it up, and held it in my hand. I was trembling, because I had "
    "to decide, forever, between two things, and I knew it. I studied a minute, holding my "
    "breath, and then I said it to myself.",
)

TEST = (
    # Jane Austen, Pride and Prejudice.
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be "
    "on his first entering a neighbourhood, this truth is well fixed.",
    # Charles Dickens, A Tale of Two Cities.
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the season of light, it was the season of darkness, it was the "
    "spring of hope, it was the winter of despair.",
    # Lewis Carroll, Alice's Adventures in Wonderland.
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do. Once or twice she had looked into the book her sister was reading, but it "
    "had no pictures or conversations in it.",
    # Abraham Lincoln, the Gettysburg Address.
    "Now we are engaged in a great civil war, testing whether that nation, or any nation so "
    "conceived and so dedicated, can long endure. We are met on a great battlefield of that war.",
    # Arthur Conan Doyle, A Scandal in Bohemia.
    "To Sherlock Holmes she is always the woman. I have seldom heard him mention her under any "
    "other name. In his eyes she eclipses and predominates the whole of her sex. It was not that "
    "he felt any emotion akin to love.",
    # Charles Darwin, On the Origin of Species.
    "There is grandeur in this view of life, with its several powers, having been originally "
    "breathed into a few forms or into one. From so simple a beginning endless forms most "
    "beautiful and most wonderful have been, and are being, evolved.",
    # Herbert George Wells, The Time Machine.
    "The fire burned brightly, and the soft radiance of the lights in the lilies of silver "
    "caught the bubbles that flashed and passed in our glasses. Our chairs embraced and caressed "
    "us rather than submitted to be sat upon.",
    # Kenneth Grahame, The Wind in the Willows.
    "The Mole had been working very hard all the morning, cleaning his little home. First with "
    "brooms, then with dusters, then on ladders and steps and chairs, with a brush and a pail, "
    "till he had dust in his throat and eyes.",
)
