"""Country codes of two letters (ISO 3166-1 alpha-2)."""

from core.errors import ConfigError

_CODES = frozenset(
    """
    ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bl bm bn bo bq br bs
    bt bv bw by bz ca cc cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee
    eg eh er es et fi fj fk fm fo fr ga gb gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm
    hn hr ht hu id ie il im in io iq ir is it je jm jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc
    li lk lr ls lt lu lv ly ma mc md me mf mg mh mk ml mm mn mo mp mq mr ms mt mu mv mw mx my mz na
    nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt pw py qa re ro rs ru rw
    sa sb sc sd se sg sh si sj sk sl sm sn so sr ss st sv sx sy sz tc td tf tg th tj tk tl tm tn to
    tr tt tv tw tz ua ug um us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw
    """.split()
)


def country_of(key: str, text: str) -> str:
    """Returns a country code in lower case.

    Args:
        key: Key of the setting, for the error.
        text: Two letters in any case; empty: unknown.

    Raises:
        ConfigError: The text is not a country code.
    """
    code = text.lower()
    if code and code not in _CODES:
        # YAML reads an unquoted `no`, the code of Norway, as false.
        fix = 'write its two letters of ISO 3166: in, de, gb (and "no" in quotes)'
        raise ConfigError(key, text, "is not a country code", fix)
    return code
