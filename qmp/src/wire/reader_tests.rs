//! The reader against a plain model of it: all tokens of a message first, then one recursive reading into a tree.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Number, Value, json};

use crate::wire::document::{Json, number};
use crate::wire::lexer::{Lexer, Token};
use crate::wire::output::render;
use crate::wire::reader::Reader;
use crate::wire::strings::unescape;

type Tokens = std::vec::IntoIter<(Token, Vec<u8>)>;

fn read(pieces: &[&[u8]]) -> Vec<Result<Value, String>> {
    let mut reader = Reader::default();
    let mut list = Vec::new();
    for mut piece in pieces.iter().copied() {
        while let Some(read) = reader.next(&mut piece) {
            let value = read.map(|document| Value::from(document.root()));
            list.push(value.map_err(|error| error.0));
        }
    }
    list
}

fn model(mut input: &[u8]) -> Vec<Result<Value, String>> {
    let (mut lexer, mut list) = (Lexer::default(), Vec::new());
    let mut tokens: Vec<(Token, Vec<u8>)> = Vec::new();
    while let Some((token, bytes)) = lexer.next(&mut input) {
        if token == Token::Stray {
            let text = String::from_utf8_lossy(bytes).into_owned();
            list.push(Err(format!("JSON parse error, stray '{text}'")));
            tokens.clear();
            continue;
        }
        tokens.push((token, bytes.to_vec()));
        let open = |opening, closing| {
            let count = |wanted| {
                let wanted = Token::Punctuation(wanted);
                tokens.iter().filter(|(token, _)| *token == wanted).count()
            };
            isize::try_from(count(opening)).expect("few")
                - isize::try_from(count(closing)).expect("few")
        };
        let (braces, brackets) = (open(b'{', b'}'), open(b'[', b']'));
        if braces < 0 || brackets < 0 || (braces == 0 && brackets == 0) {
            let mut tokens = std::mem::take(&mut tokens).into_iter();
            let value = model_value(&mut tokens);
            list.push(value.map_err(|text| format!("JSON parse error, {text}")));
        }
    }
    list
}

fn model_value(tokens: &mut Tokens) -> Result<Value, String> {
    let (token, bytes) = tokens.next().ok_or("expecting value")?;
    Ok(match (token, &bytes[..]) {
        (Token::Punctuation(b'{'), _) => return model_object(tokens),
        (Token::Punctuation(b'['), _) => return model_list(tokens),
        (Token::Text, _) => {
            let mut text = String::new();
            let unescaped = unescape(&bytes, &mut text);
            unescaped.map_err(|error| error.0.replace("JSON parse error, ", ""))?;
            Value::String(text)
        }
        (Token::Number, _) => {
            let digits = String::from_utf8(bytes).expect("digits");
            number(&digits).map_or(Value::Null, Value::Number)
        }
        (Token::Word, b"true") => Value::Bool(true),
        (Token::Word, b"false") => Value::Bool(false),
        (Token::Word, b"null") => Value::Null,
        (Token::Word, _) => {
            let word = String::from_utf8_lossy(&bytes);
            return Err(format!("invalid keyword '{word}'"));
        }
        _ => return Err("expecting value".to_owned()),
    })
}

fn model_object(tokens: &mut Tokens) -> Result<Value, String> {
    let mut members = Map::new();
    if next_is(tokens, b'}') {
        return Ok(Value::Object(members));
    }
    loop {
        let Value::String(key) = model_value(tokens)? else {
            return Err("key is not a string in object".to_owned());
        };
        if punctuation(tokens) != Some(b':') {
            return Err("missing : in object pair".to_owned());
        }
        if members.insert(key, model_value(tokens)?).is_some() {
            return Err("duplicate key".to_owned());
        }
        match punctuation(tokens) {
            Some(b',') => {}
            Some(b'}') => return Ok(Value::Object(members)),
            _ => return Err("expected separator in dict".to_owned()),
        }
    }
}

fn model_list(tokens: &mut Tokens) -> Result<Value, String> {
    let mut elements = Vec::new();
    if next_is(tokens, b']') {
        return Ok(Value::Array(elements));
    }
    loop {
        elements.push(model_value(tokens)?);
        match punctuation(tokens) {
            Some(b',') => {}
            Some(b']') => return Ok(Value::Array(elements)),
            _ => return Err("expected separator in list".to_owned()),
        }
    }
}

fn punctuation(tokens: &mut Tokens) -> Option<u8> {
    match tokens.next()? {
        (Token::Punctuation(byte), _) => Some(byte),
        _ => None,
    }
}

fn next_is(tokens: &mut Tokens, byte: u8) -> bool {
    let is_it = matches!(tokens.as_slice(), [(Token::Punctuation(next), _), ..] if *next == byte);
    if is_it {
        tokens.next();
    }
    is_it
}

/// Any value with numbers that are written back as they were read.
fn value() -> impl Strategy<Value = Value> {
    let text = || "[a-c\"'\\\\/\n\u{1}é\u{1f600}]{0,6}";
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1e9..1e9).prop_map(|double| Number::from_f64(double).map_or(json!(0), Value::Number)),
        text().prop_map(Value::String),
    ];
    leaf.prop_recursive(5, 60, 20, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..20).prop_map(Value::Array),
            prop::collection::vec((text(), inner), 0..20)
                .prop_map(|members| members.into_iter().collect()),
        ]
    })
}

/// Tokens of every kind; most that follow each other at random are faulty somewhere.
fn soup() -> impl Strategy<Value = Vec<&'static str>> {
    let common = [
        "{", "}", "[", "]", ":", ",", "\"a\":", "\"b\":", "\"a\"", "1",
    ];
    let rare = [
        "'a'",
        "-5.5e3",
        "true",
        "nul",
        "\"\\x\"",
        "\"\\u00e4\"",
        "\u{7f}",
        "01",
        " \n",
    ];
    let token = prop_oneof![8 => select(common.to_vec()), 1 => select(rare.to_vec())];
    prop::collection::vec(token, 0..24)
}

proptest! {
    #[test]
    fn what_is_written_is_read(value in value(), pretty in any::<bool>()) {
        prop_assert_eq!(read(&[&render(&value, pretty)]), [Ok(value)]);
    }

    #[test]
    fn any_tokens_mean_what_the_model_says(tokens in soup()) {
        let text = tokens.concat() + "\n";
        prop_assert_eq!(read(&[text.as_bytes()]), model(text.as_bytes()));
    }

    /// A valid message in which something is replaced, left out or doubled.
    #[test]
    fn spoilt_messages_mean_what_the_model_says(
        value in value(),
        place in any::<prop::sample::Index>(),
        by in select(vec!["", "{", "}", "[", "]", ":", ",", "\"", "\"a\":1,", "x", "0"]),
        cut in 0_usize..3,
    ) {
        let text = render(&value, false);
        let begin = place.index(text.len());
        let end = text.len().min(begin + cut);
        let spoilt = [&text[..begin], by.as_bytes(), &text[end..]].concat();
        prop_assert_eq!(read(&[&spoilt]), model(&spoilt));
    }

    #[test]
    fn pieces_of_any_size_read_the_same(value in value(), tokens in soup(), size in 1_usize..9) {
        let text = [&render(&value, true), tokens.concat().as_bytes(), b"\n"].concat();
        let pieces: Vec<&[u8]> = text.chunks(size).collect();
        prop_assert_eq!(read(&pieces), read(&[&text]));
    }
}

/// A quadratic search would take minutes for these.
#[test]
fn objects_of_many_members_take_no_longer_than_others() {
    let begun = Instant::now();
    let member = |number: usize| format!("\"key-{number}\":{number}");
    let members: Vec<String> = (0..100_000).map(member).collect();
    let whole = members.join(",");
    for (text, expected) in [
        (format!("{{{whole}}}"), None),
        (format!("{{{whole},\"key-0\":1}}"), Some("duplicate key")),
        // What was wrong first is told, also when it shows at the end only.
        (format!("{{{whole},\"key-7\":[] 1}}"), Some("duplicate key")),
        (
            format!("{{{whole},\"key-7\":[1 1]}}"),
            Some("expected separator in list"),
        ),
    ] {
        let read = read(&[text.as_bytes()]);
        let error = read[0]
            .as_ref()
            .err()
            .map(|text| text.replace("JSON parse error, ", ""));
        assert_eq!(error.as_deref(), expected);
    }
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn values_are_passed_over_and_found() {
    let mut reader = Reader::default();
    let mut text = &br#"{"a":[1,{"b":[]}],"c":{"d":{},"e":"f"},"g":null}"#[..];
    let document = reader.next(&mut text).expect("whole").expect("valid");
    let Json::Object(members) = document.root() else {
        panic!("it is an object")
    };
    assert_eq!(members.keys().collect::<Vec<_>>(), ["a", "c", "g"]);
    let part = members.find("c").map(crate::wire::document::Document::from);
    let part = part.map(|part| Value::from(part.root()));
    assert_eq!(part, Some(json!({"d": {}, "e": "f"})));
    assert!(matches!(members.find("g"), Some(Json::Null)));
    assert!(members.find("b").is_none());
}
