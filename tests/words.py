"""Words of a command line."""


def last_of_each(words):
    """The words less those that a later one replaces: a command refuses a key given twice."""
    keys = [str(word).partition("=")[0].lstrip("+") for word in words]
    return [word for i, word in enumerate(words) if keys[i] not in keys[i + 1 :]]
