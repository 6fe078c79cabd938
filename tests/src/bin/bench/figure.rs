//! What was measured, and how it is shown.

use serde_json::{Value, json};

/// What a figure must keep to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
}

/// One figure.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    name: &'static str,
    /// `None` where what is measured is not installed.
    value: Option<f64>,
    unit: &'static str,
    limit: Option<Limit>,
}

impl Figure {
    /// A figure that stands beside others and has no limit of its own.
    pub(crate) fn beside(name: &'static str, value: impl Into<Option<f64>>, unit: &'static str) -> Self {
        Self { name, value: value.into(), unit, limit: None }
    }

    /// A figure that must keep to a limit.
    pub(crate) fn limited(name: &'static str, value: f64, unit: &'static str, limit: Limit) -> Self {
        Self { name, value: Some(value), unit, limit: Some(limit) }
    }

    fn holds(&self) -> Option<bool> {
        match (self.limit?, self.value?) {
            (Limit::AtMost(limit), value) => Some(value <= limit),
            (Limit::AtLeast(limit), value) => Some(value >= limit),
        }
    }

    fn json(&self) -> Value {
        let limit = self.limit.map(|limit| match limit {
            Limit::AtMost(limit) | Limit::AtLeast(limit) => limit,
        });
        json!({ "name": self.name, "value": self.value, "unit": self.unit, "limit": limit, "holds": self.holds() })
    }

    fn row(&self) -> [String; 5] {
        let limit = match self.limit {
            None => String::new(),
            Some(Limit::AtMost(limit)) => format!("<= {}", number(limit)),
            Some(Limit::AtLeast(limit)) => format!(">= {}", number(limit)),
        };
        let holds = self.holds().map_or("", |holds| if holds { "yes" } else { "NO" });
        let value = self.value.map_or_else(|| "not installed".to_owned(), number);
        [self.name.to_owned(), value, self.unit.to_owned(), limit, holds.to_owned()]
    }
}

/// Shows figures: as JSON lines as they come, or as a table at the end.
pub(crate) struct Report {
    json: bool,
    figures: Vec<Figure>,
}

impl Report {
    /// With JSON lines, or a table.
    pub(crate) fn new(json: bool) -> Self {
        Self { json, figures: Vec::new() }
    }

    /// Takes figures in.
    pub(crate) fn add(&mut self, figures: Vec<Figure>) {
        if self.json {
            for figure in &figures {
                println!("{}", figure.json());
            }
        }
        self.figures.extend(figures);
    }

    /// Shows what was not shown yet.
    pub(crate) fn finish(&self) {
        if self.json {
            return;
        }
        let heading = ["figure", "value", "unit", "limit", "holds"].map(str::to_owned);
        let rows: Vec<_> = std::iter::once(heading).chain(self.figures.iter().map(Figure::row)).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let [name, value, unit, limit] = [width(0), width(1), width(2), width(3)];
        for [a, b, c, d, e] in &rows {
            let line = format!("{a:<name$}  {b:>value$}  {c:<unit$}  {d:<limit$}  {e}");
            println!("{}", line.trim_end());
        }
    }
}

/// A number as a person reads it: three figures or more, thousands apart.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.decimals$}");
    let (whole, fraction) = text.split_once('.').map_or((text.as_str(), None), |(whole, rest)| (whole, Some(rest)));
    let mut apart = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            apart.push(',');
        }
        apart.push(digit);
    }
    fraction.map_or(apart.clone(), |fraction| format!("{apart}.{fraction}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(number(1.234), "1.23");
        assert_eq!(number(56.78), "56.8");
        assert_eq!(number(1_234_567.8), "1,234,568");
        assert_eq!(number(100.0), "100");
    }

    #[test]
    fn a_limit_itself_holds() {
        assert_eq!(Figure::limited("a", 2.0, "x", Limit::AtMost(2.0)).holds(), Some(true));
        assert_eq!(Figure::limited("a", 2.1, "x", Limit::AtMost(2.0)).holds(), Some(false));
        assert_eq!(Figure::limited("a", 1.9, "x", Limit::AtLeast(2.0)).holds(), Some(false));
        assert_eq!(Figure::beside("a", 1.9, "x").holds(), None);
        assert_eq!(Figure::beside("a", None, "x").json()["value"], Value::Null);
    }
}
