-- Shared by put, put_writes and warm_history: what delta channels are rebuilt from. The loader puts it in front.
--
-- A hot hash's field h says what is known of that, and only while it names the hot checkpoint:
--   {checkpoint, '1' = it is a root without channels,
--    channel, kind, version, '1' = b:, d: and s: hold the seed, numbers, channel, ...}  (framed)
-- kind 'V': the checkpoint stores a value of that version, with which the history of its child begins.
-- kind 'H': the history is known. The seed is the value of the nearest ancestor that stores one (none: no ancestor
--   does). The writes on that ancestor and on those after it are in the fields h:<channel>\0<1, 2, ...>, a group for
--   each ancestor that has any, oldest first: {task \0 index, path \0 channel \0 value, ...}  (both framed)
-- kind '': not known, so that the cold tier must be asked; until that is done, or until the channel's next value.
-- numbers: how many such fields, the bytes in the last one and in all, the writes.
--
-- The functions are made where they are needed: scripts of other graphs must not pay for them.
local function histories()
  local MOST_HISTORY_BYTES, MOST_HISTORY_WRITES, HISTORY_FIELD_BYTES = 4194304, 4096, 16384

  local function frame(parts)
    local out = {}
    for i = 1, #parts do out[i] = struct.pack('>I4', #parts[i]) .. parts[i] end
    return table.concat(out)
  end

  -- Something older than the hot checkpoint changed. Writes on an ancestor (`channels`) matter to the history of their
  -- channels; an ancestor that is put again, to everything.
  local function forget_history(hot, channels)
    local known = redis.call('HGET', hot, 'h')
    if not known then return end
    local parts = unframe(known)
    if not channels then parts[1] = '' end
    for i = 3, #parts, 5 do
      if channels and channels[parts[i]] and parts[i + 1] == 'H' then parts[i + 1] = '' end
    end
    redis.call('HSET', hot, 'h', frame(parts))
  end

  -- Name the fields that an entry of h keeps.
  local function drop_history(hot, entries, i, stale)
    local channel = entries[i]
    local count = tonumber(string.match(entries[i + 4], '^%d+') or '0')
    for n = 1, count do stale[#stale + 1] = 'h:' .. channel .. '\0' .. n end
    -- With a version, it is a value again, and not a seed.
    local now = entries[i + 3] == '1' and redis.call('HMGET', hot, 'v:' .. channel, 'd:' .. channel)
    if now and not now[1] then
      stale[#stale + 1], stale[#stale + 2] = 'b:' .. channel, 'd:' .. channel
      for n = 1, tonumber(string.match(now[2] or '0', '^%d+')) do stale[#stale + 1] = 's:' .. channel .. '\0' .. n end
    end
  end

  -- Give the parent's writes to some channels: the group of each, and how many they are.
  local function writes_of(hot, names, stem, channels)
    local groups, counts = {}, {}
    if #names == 0 or next(channels) == nil then return groups, counts end
    local values = hmget(hot, names)
    for i = 1, #names do
      local value = values[i]
      local path_end = string.find(value, '\0', 1, true)
      local channel = string.sub(value, path_end + 1, string.find(value, '\0', path_end + 1, true) - 1)
      if channels[channel] then
        local group = groups[channel] or {}
        group[#group + 1] = string.sub(names[i], stem + 1)
        group[#group + 1] = value
        groups[channel], counts[channel] = group, #group / 2
      end
    end
    for channel, group in pairs(groups) do groups[channel] = frame(group) end
    return groups, counts
  end

  -- Go from the hot checkpoint to the one that is put.
  -- step: id, parent and current (the hot one's id); known: what is hot of the current one is complete; writes: the
  --   names of its writes; given: {..., '1' = the new one has no channels, channel, what it stores of that ('v': a
  --   value, 'n': none, of a new version, 'u': nothing new), version, channel, ...}
  -- Adds to fields and stale; returns the channels whose seed must stay.
  local function advance_history(hot, step, fields, stale)
    local before = redis.call('HGET', hot, 'h')
    local old, given = before and unframe(before) or {}, step.given
    local continues, root = step.current == step.parent and old[1] == step.current, step.parent == ''
    local at, made, waiting = {}, {}, {}
    for i = 3, #old, 5 do at[old[i]] = i end
    for i = 3, step.known and #given or 0, 3 do
      local channel, kind, version = given[i], given[i + 1], given[i + 2]
      local from = continues and at[channel]
      local last, last_version = from and old[from + 1], from and old[from + 2]
      if root or (continues and not from and old[2] == '1') then last, last_version = 'R', '' end
      if kind == 'v' or (kind == 'u' and last == 'V' and last_version == version) then
        made[channel] = {kind = 'V', version = version}
      elseif last and last ~= '' and (kind == 'n' or last_version == version) then
        local numbers = last == 'H' and {string.match(old[from + 4], '^(%d+) (%d+) (%d+) (%d+)$')} or {0, 0, 0, 0}
        for n = 1, 4 do numbers[n] = tonumber(numbers[n]) end
        local seed = (last == 'V' and '1') or (last == 'H' and old[from + 3]) or ''
        made[channel] = {kind = 'H', version = version, seed = seed, numbers = numbers, continues = last == 'H'}
        waiting[channel] = not root or nil
      end
    end

    local too_many = #step.writes > MOST_HISTORY_WRITES
    local groups, counts = writes_of(hot, too_many and {} or step.writes, #('w:' .. step.parent .. '\0'), waiting)
    for channel in pairs(waiting) do
      local numbers, group = made[channel].numbers, groups[channel]
      if too_many then
        made[channel] = nil
      elseif group then
        group = struct.pack('>I4', #group) .. group
        numbers[3], numbers[4] = numbers[3] + #group, numbers[4] + counts[channel]
        if numbers[3] > MOST_HISTORY_BYTES or numbers[4] > MOST_HISTORY_WRITES then
          made[channel] = nil
        else
          local stem = 'h:' .. channel .. '\0'
          local last = numbers[2] + #group <= HISTORY_FIELD_BYTES and redis.call('HGET', hot, stem .. numbers[1])
          if last then
            group = last .. group
          else
            numbers[1] = numbers[1] + 1
          end
          numbers[2] = #group
          fields[#fields + 1], fields[#fields + 2] = stem .. numbers[1], group
        end
      end
    end

    for i = 3, #old, 5 do
      if not (made[old[i]] and made[old[i]].continues) then drop_history(hot, old, i, stale) end
    end

    local bare = step.known and root and given[2] == '1'
    local after, seeds = {step.id, bare and '1' or ''}, {}
    for channel, one in pairs(made) do
      local numbers = one.numbers and string.format('%d %d %d %d', unpack(one.numbers)) or ''
      seeds[channel] = one.seed == '1' or nil
      for n, part in ipairs({channel, one.kind, one.version, one.seed or '', numbers}) do after[#after + 1] = part end
    end
    if #after > 2 or bare then
      fields[#fields + 1], fields[#fields + 2] = 'h', frame(after)
    elseif before then
      stale[#stale + 1] = 'h'
    end
    return seeds
  end

  return {frame = frame, forget = forget_history, drop = drop_history, advance = advance_history}
end
