# As much of nixpkgs' `lib` as the module uses: options, types and definitions with conditions and priorities, so that its options
# are checked on a machine that has Nix and no nixpkgs. Errors name the option, as nixpkgs' do. Where it is not sure, it is stricter.
let
  inherit (builtins)
    all
    attrNames
    concatLists
    concatMap
    concatStringsSep
    elem
    elemAt
    filter
    foldl'
    genList
    hasAttr
    head
    isAttrs
    isBool
    isFunction
    isInt
    isList
    isString
    length
    listToAttrs
    mapAttrs
    match
    removeAttrs
    toJSON
    ;

  nameValuePair = name: value: { inherit name value; };
  mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
  unique = foldl' (found: next: if elem next found then found else found ++ [ next ]) [ ];
  show = concatStringsSep ".";
  showValue =
    value:
    if isFunction value then
      "<function>"
    else if isAttrs value then
      "{ … }"
    else
      toJSON value;

  # Definitions: a value may stand under conditions, in a merge, and with a priority; the lowest wins.
  defaultPriority = 100;
  optionPriority = 1500;
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };

  # Brings what stands around a set to each of its attributes, without looking at conditions: those may depend on them.
  pushDown =
    value:
    {
      "if" = map (mapAttrs (_: mkIf value.condition)) (pushDown value.content);
      "override" = map (mapAttrs (_: mkOverride value.priority)) (pushDown value.content);
      "merge" = concatMap pushDown value.contents;
    }
    .${value._type or ""} or [ value ];

  # Of one option: what is left of a definition, with its priority.
  discharge =
    priority: value:
    {
      "if" = if value.condition then discharge priority value.content else [ ];
      "override" = discharge value.priority value.content;
      "merge" = concatMap (discharge priority) value.contents;
    }
    .${value._type or ""} or [ { inherit priority value; } ];

  mergeDefinitions =
    loc: type: definitions:
    let
      found = concatMap (discharge defaultPriority) definitions;
      lowest = foldl' (a: b: if b.priority < a then b.priority else a) optionPriority found;
      values = map (definition: definition.value) (
        filter (definition: definition.priority == lowest) found
      );
      wrong = filter (value: !type.check value) values;
    in
    if values == [ ] then
      throw "The option `${show loc}' was accessed but has no value defined. Try setting the option."
    else if wrong != [ ] then
      throw "A definition for option `${show loc}' is not of type `${type.name}'. Definition: ${showValue (head wrong)}"
    else
      type.merge loc values;

  one =
    loc: values:
    if all (value: value == head values) values then
      head values
    else
      throw "The option `${show loc}' has conflicting definition values: ${concatStringsSep ", " (map showValue values)}";
  mkType = name: check: {
    inherit name check;
    merge = one;
  };
  mkListType = name: check: element: {
    inherit name check;
    merge =
      loc: values:
      let
        definitions = concatLists values;
        at =
          index:
          mergeDefinitions (loc ++ [ "[entry ${toString (index + 1)}]" ]) element [
            (elemAt definitions index)
          ];
      in
      genList at (length definitions);
  };

  types = rec {
    anything = mkType "anything" (_: true);
    bool = mkType "boolean" isBool;
    package = mkType "package" (value: isAttrs value && value ? outPath);
    str = mkType "string" isString;
    nonEmptyStr = mkType "non-empty string" (value: isString value && match "[ \t\r\n]*" value == null);
    strMatching =
      pattern:
      mkType "string matching the pattern ${pattern}" (
        value: isString value && match pattern value != null
      );
    enum = values: mkType "one of ${toJSON values}" (value: elem value values);
    ints.between =
      low: high:
      mkType "integer between ${toString low} and ${toString high}" (
        value: isInt value && low <= value && value <= high
      );
    nullOr =
      type:
      mkType "null or ${type.name}" (value: value == null || type.check value)
      // {
        merge = loc: values: if all isNull values then null else type.merge loc values;
      };
    listOf = element: mkListType "list of ${element.name}" isList element;
    nonEmptyListOf =
      element:
      mkListType "non-empty list of ${element.name}" (value: isList value && value != [ ]) element;
    attrsOf = element: {
      name = "attribute set of ${element.name}";
      check = isAttrs;
      merge =
        loc: values:
        let
          sets = concatMap pushDown values;
          names = unique (concatMap attrNames sets);
          at =
            name:
            mergeDefinitions (loc ++ [ name ]) element (map (set: set.${name}) (filter (hasAttr name) sets));
        in
        listToAttrs (map (name: nameValuePair name (at name)) names);
    };
    submodule = module: {
      name = "submodule";
      check = value: isAttrs value || isFunction value;
      merge =
        loc: values:
        (evalAt loc {
          modules = [ module ] ++ map (config: { inherit config; }) values;
        }).config;
    };
  };

  # What a module says, each part at its place.
  normal =
    args: module:
    let
      given = if builtins.isPath module then import module else module;
      said = if isFunction given then given args else given;
    in
    if said ? options || said ? config then
      {
        imports = said.imports or [ ];
        options = said.options or { };
        config = said.config or { };
      }
    else
      {
        imports = said.imports or [ ];
        options = { };
        config = removeAttrs said [ "imports" ];
      };
  withImports =
    args: module: [ (normal args module) ] ++ concatMap (withImports args) (normal args module).imports;

  isOption = value: value._type or "" == "option";

  # A folder of options, or one option.
  evalTree =
    loc: declarations: definitions:
    let
      options = filter isOption declarations;
      sets = concatMap pushDown definitions;
      declared = unique (concatMap attrNames declarations);
      unknown = filter (name: !elem name declared) (concatMap attrNames sets);
      at =
        name:
        evalTree (loc ++ [ name ]) (map (set: set.${name}) (filter (hasAttr name) declarations)) (
          map (set: set.${name}) (filter (hasAttr name) sets)
        );
    in
    if options != [ ] then
      if length declarations > 1 then
        throw "The option `${show loc}' is already declared."
      else
        evalOption loc (head options) definitions
    else if unknown != [ ] then
      throw "The option `${show (loc ++ [ (head unknown) ])}' does not exist."
    else
      listToAttrs (map (name: nameValuePair name (at name)) declared);

  evalOption =
    loc: option: definitions:
    let
      default = if option ? default then [ (mkOverride optionPriority option.default) ] else [ ];
    in
    if option.readOnly or false && definitions != [ ] then
      throw "The option `${show loc}' is read-only, but it's set multiple times."
    else
      mergeDefinitions loc option.type (definitions ++ default);

  evalAt =
    loc:
    {
      modules,
      specialArgs ? { },
    }:
    let
      args = specialArgs // {
        inherit config lib;
      };
      all = concatMap (withImports args) modules;
      # As nixpkgs merges lists: what comes last is first.
      definitions = foldl' (found: module: [ module.config ] ++ found) [ ] all;
      config = evalTree loc (map (module: module.options) all) definitions;
    in
    {
      inherit config;
    };

  lib = {
    inherit
      mapAttrsToList
      mkIf
      mkMerge
      mkOverride
      nameValuePair
      types
      ;
    evalModules = evalAt [ ];
    mkOption = option: option // { _type = "option"; };
    mkEnableOption =
      what:
      lib.mkOption {
        type = types.bool;
        default = false;
        description = "Whether to enable ${what}.";
      };
    mkDefault = mkOverride 1000;
    mkForce = mkOverride 50;
    literalExpression = text: {
      _type = "literalExpression";
      inherit text;
    };
    getExe' = package: program: "${package}/bin/${program}";
    hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
    genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
    mapAttrs' = f: set: listToAttrs (mapAttrsToList f set);
    optionalAttrs = condition: set: if condition then set else { };
    optionals = condition: list: if condition then list else [ ];
  };
in
lib
