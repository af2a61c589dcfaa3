//! A C header as cbindgen writes it, taken apart: what it declares, and the
//! comments that describe it.

/// A header's parts, in its order.
pub struct Header {
    /// The comment that it begins with.
    pub intro: String,
    pub items: Vec<Item>,
}

/// Something that has a comment of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub name: String,
    /// The comment's text, without its frame.
    pub doc: String,
    /// What stands there in C, without comments and what ends it.
    pub code: String,
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Macro,
    /// A struct of which only the name is known.
    Opaque,
    Struct(Vec<Item>),
    Member,
    Typedef,
    Function,
    /// A function that the header itself defines.
    Inline,
}

impl Header {
    pub fn parse(text: &str) -> Self {
        let (_, intro) = text.split_once("/*").expect("a comment");
        let (intro, rest) = intro.split_once("*/").expect("comments end");
        let items = described(rest).map(|(doc, code)| Item::parse(doc, code));
        Self {
            intro: comment(intro),
            items: items.collect(),
        }
    }

    /// The functions that a library with this header exports.
    pub fn functions(&self) -> impl Iterator<Item = &Item> {
        self.items.iter().filter(|item| item.kind == Kind::Function)
    }
}

/// Each comment of the form that describes something, with the text behind it.
fn described(text: &str) -> impl Iterator<Item = (String, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (_, found) = rest.split_once("/**")?;
        let (doc, code) = found.split_once("*/").expect("comments end");
        let code = declaration(code.trim_start());
        // The comments within a struct are its members'.
        let end = struct_end(code).unwrap_or(0);
        rest = &code[end..];
        Some((comment(doc), code))
    })
}

/// What follows a comment, without the attributes that only some compilers see.
fn declaration(mut code: &str) -> &str {
    while ["#if", "#endif", "__attribute__"]
        .iter()
        .any(|other| code.starts_with(other))
    {
        code = code.split_once('\n').expect("a declaration follows").1;
    }
    code
}

/// Where a struct's definition ends, if `code` begins with one.
fn struct_end(code: &str) -> Option<usize> {
    let (first, _) = code.split_once('\n')?;
    let is_struct = first.starts_with("struct ") && first.ends_with('{');
    is_struct.then(|| code.find("\n};").expect("structs end"))
}

impl Item {
    /// A struct's members.
    pub fn members(&self) -> &[Self] {
        match &self.kind {
            Kind::Struct(members) => members,
            _ => &[],
        }
    }

    fn parse(doc: String, code: &str) -> Self {
        let (kind, code) = if code.starts_with("#define") {
            (Kind::Macro, definition(code))
        } else if let Some(end) = struct_end(code) {
            let (_, body) = code[..end].split_once('{').unwrap();
            let members = described(body).map(|(doc, code)| Self {
                kind: Kind::Member,
                ..Self::parse(doc, code)
            });
            (
                Kind::Struct(members.collect()),
                code.lines().next().unwrap(),
            )
        } else if code.starts_with("static inline") {
            (Kind::Inline, code.split("\n{").next().unwrap())
        } else {
            let code = code.split(';').next().unwrap();
            let kind = match code.split(' ').next() {
                Some("typedef") => Kind::Typedef,
                Some("struct") if !code.contains(['(', '*']) => Kind::Opaque,
                _ => Kind::Function,
            };
            (kind, code)
        };
        let code = code.trim_end_matches([' ', '{']);
        Self {
            name: name(code, &kind).to_owned(),
            doc,
            code: code.to_owned(),
            kind,
        }
    }
}

/// A macro's lines.
fn definition(code: &str) -> &str {
    let mut end = 0;
    for line in code.split_inclusive('\n') {
        end += line.len();
        if !line.trim_end().ends_with('\\') {
            break;
        }
    }
    code[..end].trim_end()
}

/// What a declaration declares.
fn name<'a>(code: &'a str, kind: &Kind) -> &'a str {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let declarator = match (kind, code.split_once("(*")) {
        (Kind::Macro, _) => code.split_whitespace().nth(1).unwrap(),
        // A pointer to a function: `int (*name)(…)`.
        (_, Some((_, pointer))) => pointer.split(')').next().unwrap(),
        (_, None) => code.split(['(', '[']).next().unwrap(),
    };
    let start = declarator.trim_end().rfind(|c| !is_word(c));
    &declarator.trim_end()[start.map_or(0, |at| at + 1)..]
}

/// A comment's lines without the stars that frame them.
fn comment(text: &str) -> String {
    let lines = text.trim().lines().map(|line| {
        let line = line.trim();
        let line = line.strip_prefix('*').unwrap_or(line);
        line.strip_prefix(' ').unwrap_or(line).trim_end()
    });
    lines.collect::<Vec<_>>().join("\n").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_taken_apart() {
        let header = Header::parse(
            "/*\n * Intro\n *\n *   indented\n */\n#include <x.h>\n\
             /** One. */\n#define ONE 1\n\
             /**\n * Opaque.\n */\nstruct o;\n\
             /**\n * Struct;\n * two lines.\n */\nstruct s {\n    /**\n     * A call.\n     */\n    \
             int (*call)(void *opaque,\n                int n);\n    /**\n     * Array.\n     */\n    \
             uint64_t array[32];\n};\n\
             /**\n * Type.\n */\ntypedef void (*t)(int);\n\
             /**\n * Function.\n */\n#ifdef C\n__attribute__((a))\n#endif\nconst struct o *f(struct s *s,\n         int n);\n\
             /** Macro. */\n#define TWO \\\n    2\n\
             /** Inline. */\nstatic inline void i(int n)\n{\n    n;\n}\n",
        );
        assert_eq!(header.intro, "Intro\n\n  indented");
        let names: Vec<_> = header.items.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(names, ["ONE", "o", "s", "t", "f", "TWO", "i"]);
        let [one, opaque, structure, typedef, function, two, inline] = &header.items[..] else {
            unreachable!();
        };
        assert_eq!(
            (&one.kind, one.code.as_str()),
            (&Kind::Macro, "#define ONE 1")
        );
        assert_eq!(two.code, "#define TWO \\\n    2");
        assert_eq!(opaque.kind, Kind::Opaque);
        assert_eq!(structure.doc, "Struct;\ntwo lines.");
        let members: Vec<_> = structure
            .members()
            .iter()
            .map(|m| (m.name.as_str(), m.doc.as_str()))
            .collect();
        assert_eq!(members, [("call", "A call."), ("array", "Array.")]);
        assert_eq!(typedef.kind, Kind::Typedef);
        assert_eq!(
            function.code,
            "const struct o *f(struct s *s,\n         int n)"
        );
        assert_eq!(header.functions().collect::<Vec<_>>(), [function]);
        assert_eq!(
            (&inline.kind, inline.code.as_str()),
            (&Kind::Inline, "static inline void i(int n)")
        );
    }
}
